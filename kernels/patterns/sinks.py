"""The first keys, seen by all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Sinks(Primitive):
    """The first `size` keys (Xiao et al. 2023, "Efficient Streaming Language Models")."""

    size: int
    name: ClassVar[str] = "sinks"
    form: ClassVar[str] = "sinks:s"
    growth: ClassVar[str] = "s"
    example: ClassVar[tuple[int, ...]] = (4,)

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Among the first, whoever asks."""
        return (key < self.size).broadcast_to((query - key).shape)

    def runs(self, view: View) -> list[Run]:
        """One stretch."""
        return [Run(torch.zeros_like(view.first), self.size)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """Before, at and behind the end of the first keys."""
        return (page - self.size // PAGE).clamp(-1, 1) + 1

    def far(self, causal: bool, tokens: int) -> Far:
        """Everywhere: it depends on the page alone."""
        return Far(0, 1, 0)
