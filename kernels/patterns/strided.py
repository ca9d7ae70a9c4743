"""Keys at multiples of a stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.residue import period_of, residue
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Strided(Primitive):
    """Every `size`-th key back from the query, its own included (Child et al. 2019).

    Bidirectional: forward, too. The paper's local part is a `window` of its own:
    `window:128+strided:128`. With a stride near sqrt n a query sees some sqrt n keys.
    """

    size: int
    name: ClassVar[str] = "strided"
    form: ClassVar[str] = "strided:s"
    growth: ClassVar[str] = "sqrt n"
    example: ClassVar[tuple[int, ...]] = (16,)
    by_distance: ClassVar[bool] = True

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """At a multiple of the stride."""
        return (query - key) % self.size == 0

    def runs(self, view: View) -> list[Run]:
        """A progression from the first stretch that reaches key 0."""
        return [Run(-(-view.first % self.size), view.size, self.size)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """Which diagonals there are."""
        return residue((tile - page) * PAGE, self.size)

    def far(self, causal: bool, tokens: int) -> Far:
        """Everywhere: diagonals repeat."""
        return Far(0, period_of(self.size), 0)

    @property
    def keeps_previous(self) -> bool:
        """If it leaves nothing out."""
        return self.size == 1
