"""Blocks of equal size, from position 0 on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View

EDGES = PAGE + 1
"""Places of a block's end in a page, and one for none."""


@dataclass(frozen=True, slots=True)
class BlockLocal(Primitive):
    """The keys of the query's own block of `size`.

    Qiu et al. 2019, "Blockwise Self-Attention for Long Document Understanding", without the heads
    that look at other blocks.
    """

    size: int
    name: ClassVar[str] = "block_local"
    form: ClassVar[str] = "block_local:b"
    growth: ClassVar[str] = "b"
    example: ClassVar[tuple[int, ...]] = (16,)

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """In the same block."""
        return query // self.size == key // self.size

    def runs(self, view: View) -> list[Run]:
        """One stretch."""
        return [block_run(view, self.size)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """How the blocks of the tile's queries and those of the page's keys overlap."""
        return block_code(tile, page, self.size)

    def far(self, causal: bool, tokens: int) -> Far:
        """Out of the block."""
        return Far(0, 1, block_reach(self.size))


def block_run(view: View, size: int) -> Run:
    """The keys that share a block of so many with the view's rows."""
    starts = view.first // size * size
    width = size * ((view.size - 1) // size + 1)
    if size % view.size == 0:
        return Run(starts, width)
    stop = (view.first + (view.size - 1)) // size * size + size
    return Run(starts, width + size, stop=stop)


def block_code(tile: Tensor, page: Tensor, size: int) -> Tensor:
    """A number from 0 on for how blocks of `size` overlap that hold queries and keys.

    Given the blocks of the first query and the first key, or how far apart they are, all depends on
    where the first block ends in the tile and where in the page; behind the ends of both it does
    not matter where.
    """
    query, key = tile * PAGE, page * PAGE
    most = PAGE // size + 1  # blocks farther apart have nothing in common
    apart = query // size - key // size
    ends = (size - query % size).clamp_max(PAGE) * EDGES + (size - key % size).clamp_max(PAGE)
    code = (apart + (most + 1)) * EDGES**2 + ends
    return code.masked_fill_(apart.abs() > most, 0)


def block_reach(size: int) -> int:
    """Pages so far away share no block of so many keys with a tile."""
    return (size + PAGE - 2) // PAGE + 1
