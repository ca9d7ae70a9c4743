"""Blocks, and the last keys of the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.patterns.blocks import EDGES, block_code, block_reach, block_run
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Fixed(Primitive):
    """The keys of the query's own block, and the last `summary` of every earlier block.

    Child et al. 2019, "Generating Long Sequences with Sparse Transformers": l is `size` and c is
    `summary`. Bidirectional: the last of every block. With a block near sqrt n a query sees some
    sqrt n keys.

    Raises:
        PatternError: the summary is longer than the block.
    """

    size: int
    summary: int
    name: ClassVar[str] = "fixed"
    form: ClassVar[str] = "fixed:l,c"
    growth: ClassVar[str] = "sqrt n"
    example: ClassVar[tuple[int, ...]] = (16, 4)

    def __post_init__(self) -> None:
        Primitive.__post_init__(self)
        if self.summary > self.size:
            raise PatternError(
                f"c of {self.form} must not be more than l, {self.size}, but is {self.summary}"
            )

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """In the same block, or among the last of one."""
        same = query // self.size == key // self.size
        return same | (key % self.size >= self.size - self.summary)

    def runs(self, view: View) -> list[Run]:
        """The block, and a progression of blocks' ends."""
        first = torch.full_like(view.first, self.size - self.summary)
        return [block_run(view, self.size), Run(first, self.summary, self.size)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """How the blocks overlap, and where the ends of blocks lie in the page."""
        place = page * PAGE % self.size
        # Where a block ends in the page, that says all; else only one end can begin in it.
        end = (self.size - place).clamp_max(PAGE)
        begin = (self.size - self.summary - place).clamp(0, PAGE)
        return (block_code(tile, page, self.size) * EDGES + end) * EDGES + begin

    def far(self, causal: bool, tokens: int) -> Far:
        """Out of the block it depends on the page alone."""
        return Far(0, 1, block_reach(self.size))

    @property
    def keeps_previous(self) -> bool:
        """The key before a block is the last of another."""
        return True
