"""The pattern of dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import FOREVER, Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Full(Primitive):
    """Every key."""

    name: ClassVar[str] = "full"
    form: ClassVar[str] = "full"
    growth: ClassVar[str] = "n"
    example: ClassVar[tuple[int, ...]] = ()
    by_distance: ClassVar[bool] = True

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Always."""
        return torch.ones_like(query - key, dtype=torch.bool)

    def runs(self, view: View) -> list[Run]:
        """One stretch without end."""
        return [Run(torch.zeros_like(view.first), FOREVER)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """All pages are alike."""
        return torch.zeros_like(page)

    def far(self, causal: bool, tokens: int) -> Far:
        """Everywhere."""
        return Far(0, 1, 0)

    @property
    def keeps_previous(self) -> bool:
        """It sees all."""
        return True
