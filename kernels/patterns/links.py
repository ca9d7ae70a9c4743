"""Blocks that see blocks, written out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Links(Primitive):
    """For each block of `size` queries the blocks of keys that it sees; those behind see nothing.

    What a published model draws by a generator of its own, such as BigBird's random blocks (Zaheer
    et al. 2020), no rule of positions says. A pattern's text has no form for it.

    Raises:
        PatternError: the size, or the number of a block, is not possible.
    """

    size: int
    seen: tuple[tuple[int, ...], ...]  # of each block of queries
    name: ClassVar[str] = "links"
    form: ClassVar[str] = "links"
    growth: ClassVar[str] = "b"

    def __post_init__(self) -> None:
        if self.size < 1 or any(block < 0 for row in self.seen for block in row):
            raise PatternError("blocks have a size of at least 1, and numbers from 0 on")

    def __str__(self) -> str:
        return f"links:{self.size},{sum(map(len, self.seen))}"

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """The query's block is linked to the key's."""
        listed = _listed(self.seen, query.device)
        rows, most = listed.shape[0] - 1, max(int(listed.max()), 0) + 1
        table = torch.zeros(rows + 1, most + 1, dtype=torch.bool, device=query.device)
        table.scatter_(1, listed.where(listed >= 0, most), True)
        table[:, most] = False  # what is none, and blocks behind all that are seen
        row = (query // self.size).clamp_max(rows)
        return table[row, (key // self.size).clamp_max(most)]

    def runs(self, view: View) -> list[Run]:
        """A stretch for each block that one of a row's blocks sees."""
        listed = _listed(self.seen, view.first.device)
        row = view.first // self.size  # [rows, 1]
        last = (view.first + (view.size - 1)) // self.size
        most = int((last - row).max()) + 1 if len(row) else 1
        row = torch.minimum(row + torch.arange(most, device=row.device), last)  # [rows, blocks]
        blocks = listed[row.clamp_max(len(listed) - 1)].flatten(1)  # [rows, stretches]
        return [Run(blocks * self.size, self.size)]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """All of a page or nothing; where blocks cut pages, each pair is of its own kind."""
        if self.size % PAGE == 0:
            return self.sees(tile * PAGE, page * PAGE, causal).long()
        return tile * (int(page.max()) + 1) + page if len(page) else page

    def far(self, causal: bool, tokens: int) -> Far:
        """Nothing repeats."""
        return Far(0, 0, 0)


@lru_cache(maxsize=8)
def _listed(seen: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 [blocks + 1, most], -1 for none, as in the last row."""
    most = max(map(len, seen), default=0) or 1
    rows = [(*row, *(-1,) * (most - len(row))) for row in (*seen, ())]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), most)
