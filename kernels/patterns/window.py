"""Keys at a limited distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.residue import RESIDUES, residue
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Window(Primitive):
    """The keys nearest to the query.

    Causal: `size` keys, the last of which is the query's own (Mistral's `sliding_window`; where
    others write that q - k <= W, `size` is W + 1). Bidirectional: those with |q - k| <= size // 2,
    Longformer's one-sided half, `size` + 1 keys if that is even.
    """

    size: int
    name: ClassVar[str] = "window"
    form: ClassVar[str] = "window:w"
    growth: ClassVar[str] = "w"
    example: ClassVar[tuple[int, ...]] = (16,)
    by_distance: ClassVar[bool] = True

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Within the distance."""
        least, most = _distances(self.size, causal)
        return (query - key >= least) & (query - key <= most)

    def runs(self, view: View) -> list[Run]:
        """One stretch."""
        least, most = _distances(self.size, view.causal)
        return [Run(view.first - most, most - least + view.size)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """Where the two edges run."""
        return _edges((tile - page) * PAGE, *_distances(self.size, causal))

    def far(self, causal: bool, tokens: int) -> Far:
        """Out of the distance."""
        return Far(0, 1, _pages(_distances(self.size, causal)[1]))

    @property
    def keeps_previous(self) -> bool:
        """If it is more than the query's own key."""
        return self.size >= 2


@dataclass(frozen=True, slots=True)
class Dilated(Primitive):
    """A window with gaps: keys `step` apart (Beltagy et al. 2020, "Longformer").

    Causal: `size` keys, the last of which is the query's own. Bidirectional: the query's own and
    size // 2 on either side. `dilated:w,1` is `window:w`.
    """

    size: int
    step: int
    name: ClassVar[str] = "dilated"
    form: ClassVar[str] = "dilated:w,d"
    growth: ClassVar[str] = "w"
    example: ClassVar[tuple[int, ...]] = (8, 4)
    by_distance: ClassVar[bool] = True

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Within the distance, which is a multiple of the step."""
        (least, most), distance = self._reach(causal), query - key
        return (distance >= least) & (distance <= most) & (distance % self.step == 0)

    def runs(self, view: View) -> list[Run]:
        """A progression."""
        least, most = self._reach(view.causal)
        count = (most - least) // self.step + 1
        return [Run(view.first - most, view.size, self.step, count)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """Where the two edges run, and the diagonals between them."""
        distance = (tile - page) * PAGE
        return _edges(distance, *self._reach(causal)) * RESIDUES + residue(distance, self.step)

    def far(self, causal: bool, tokens: int) -> Far:
        """Out of the distance."""
        return Far(0, 1, _pages(self._reach(causal)[1]))

    @property
    def keeps_previous(self) -> bool:
        """If there are no gaps."""
        return self.size >= 2 and self.step == 1

    def _reach(self, causal: bool) -> tuple[int, int]:
        least, most = _distances(self.size, causal)
        return least * self.step, most * self.step


def _distances(size: int, causal: bool) -> tuple[int, int]:
    """The least and the greatest q - k, in steps."""
    return (0, size - 1) if causal else (-(size // 2), size // 2)


def _pages(distance: int) -> int:
    """Pages so far away hold no key within the distance."""
    return (distance + PAGE - 1) // PAGE + 1


def _edges(distance: Tensor, least: int, most: int) -> Tensor:
    """Where a tile lies to the edges of a band, if its first query and a page's first key are so
    far apart: what is wholly on one side of an edge is alike.
    """
    upper = (distance - most).clamp(1 - PAGE, PAGE) + (PAGE - 1)
    lower = (distance - least).clamp(-PAGE, PAGE - 1) + PAGE
    return upper * (2 * PAGE) + lower
