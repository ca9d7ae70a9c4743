"""Rows and columns of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernels.page import PAGE
from kernels.patterns.blocks import EDGES, block_code, block_reach, block_run
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.residue import RESIDUES, period_of, residue
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Axial(Primitive):
    """The keys in the query's row or column of a grid, which is written row by row.

    Ho et al. 2019, "Axial Attention in Multidimensional Transformers". Behind a grid of
    `rows` x `cols` positions the next one begins, as a video's next frame does; a query sees only
    its own. With as many rows as columns it sees some 2 sqrt n keys of a grid of n.
    """

    rows: int
    cols: int
    name: ClassVar[str] = "axial"
    form: ClassVar[str] = "axial:rows,cols"
    growth: ClassVar[str] = "sqrt n"
    example: ClassVar[tuple[int, ...]] = (8, 16)

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """In the same row, or in the same column of the same grid."""
        row = query // self.cols == key // self.cols
        grid = query // self._area == key // self._area
        return row | (grid & ((query - key) % self.cols == 0))

    def runs(self, view: View) -> list[Run]:
        """The row, and a progression of the column's places."""
        grid = view.first // self._area * self._area
        first = grid - (grid - view.first) % self.cols
        stop = (view.first + (view.size - 1)) // self._area * self._area + self._area
        column = Run(first, view.size, self.cols, stop=stop)
        return [block_run(view, self.cols), column]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """How rows overlap, how grids do, and the diagonals of columns."""
        grid = block_code(tile, page, self._area)
        row = block_code(tile, page, self.cols) * RESIDUES
        row += residue((tile - page) * PAGE, self.cols)
        blocks = 2 * (PAGE // self._area + 2) * EDGES**2
        return (row * blocks + grid).masked_fill_(grid == 0, 0)

    def far(self, causal: bool, tokens: int) -> Far:
        """Out of the row, if there is one grid; else out of the grid."""
        if tokens <= self._area:
            return Far(0, period_of(self.cols), block_reach(self.cols))
        return Far(0, 1, block_reach(self._area))

    @property
    def _area(self) -> int:
        return self.rows * self.cols
