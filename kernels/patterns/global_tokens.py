"""Global tokens: seen by all, and seeing all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import FOREVER, Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Global(Primitive):
    """The first `size` tokens are seen by all and, in a bidirectional pattern, see all.

    Beltagy et al. 2020, "Longformer", whose global tokens may stand anywhere; these are the first.
    In a causal pattern what remains are sinks.
    """

    size: int
    name: ClassVar[str] = "global"
    form: ClassVar[str] = "global:g"
    growth: ClassVar[str] = "g"
    example: ClassVar[tuple[int, ...]] = (4,)

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """One of both is among the first."""
        return (key < self.size) | (query < self.size)

    def runs(self, view: View) -> list[Run]:
        """The first keys, or all."""
        starts = torch.zeros_like(view.first)
        if view.causal or view.earliest >= self.size:
            return [Run(starts, self.size)]
        stop = starts.masked_fill(view.first < self.size, FOREVER).clamp_min(self.size)
        return [Run(starts, FOREVER, stop=stop)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """Before, at and behind the end of the first tokens, on both sides.

        Queries among the first see, in a causal pattern, only keys that are among them, too.
        """
        of_page = (page - self.size // PAGE).clamp(-1, 1) + 1
        return of_page if causal else of_page * 3 + (tile - self.size // PAGE).clamp(-1, 1) + 1

    def far(self, causal: bool, tokens: int) -> Far:
        """Behind the tiles that see all."""
        return Far(0 if causal else -(-self.size // PAGE), 1, 0)
