"""Blocks drawn at random, reproducibly."""

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

LOW = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Random(Primitive):
    """For each block of 64 queries `count` blocks of 64 keys, drawn at random.

    Zaheer et al. 2020, "Big Bird". Block t draws among the t blocks before it: they are cut into
    `count` parts, equal as far as possible, and one block of each is drawn, so none twice; where
    they are fewer, it sees them all. What is drawn follows from the seed, t and the number of the
    part by a hash, so that it depends neither on how many blocks there are nor on what was drawn
    for others.

    Bidirectional: two blocks see each other where the later one drew the earlier one. Each then
    draws half as many (of an odd number a coin decides about the last), so that a block sees
    `count` others on average.

    BigBird's published code places them otherwise. It leaves out the blocks that its window and its
    global blocks hold, and draws only among an input's first blocks: 16 of the usual lengths, else
    2r + 5. It draws for each head, from the state of a common generator, and transformers takes
    block 0 in place of each where it does not train. Here any earlier block may be drawn, and all
    heads share what is drawn.
    """

    count: int
    seed: int
    name: ClassVar[str] = "random"
    form: ClassVar[str] = "random:r,seed"
    growth: ClassVar[str] = "r"
    example: ClassVar[tuple[int, ...]] = (1, 0)

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """The later block drew the earlier one."""
        late, early = query // PAGE, key // PAGE
        if (query - key).numel() < PAGE * (query.numel() + key.numel()):
            return self._linked(late, early, causal)
        # Of many pairs most are of the same blocks.
        (rows, row), (cols, col) = (torch.unique(x, return_inverse=True) for x in (late, early))
        return self._linked(rows[:, None], cols, causal)[row, col]

    def runs(self, view: View) -> list[Run]:
        """One stretch for each block that is drawn or, if bidirectional, drew one of these."""
        block = view.first // PAGE  # [rows, 1]
        part = torch.arange(min(self.count, view.latest // PAGE), device=block.device)
        drawn = self._draw(block, part, view.causal)  # [rows, count]
        runs = [Run(drawn.where(part < self._parts(block, view.causal), -PAGE) * PAGE, PAGE)]
        first, last = view.earliest // PAGE + 1, view.latest // PAGE
        if not view.causal and last >= first:
            runs.append(Run(self._drawers(block, part, first, last) * PAGE, PAGE))
        return runs

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """All of a page or nothing."""
        return self.sees(tile * PAGE, page * PAGE, causal).long()

    def far(self, causal: bool, tokens: int) -> Far:
        """Nothing repeats."""
        return Far(0, 0, 0)

    def _linked(self, late: Tensor, early: Tensor, causal: bool) -> Tensor:
        drew = self._drew(late, early, causal)
        return drew if causal else drew | self._drew(early, late, causal)

    def _parts(self, block: Tensor, causal: bool) -> Tensor:
        """How many blocks a block draws."""
        if causal:
            return block.clamp_max(self.count)
        coin = _hash(self.seed, block, torch.full_like(block, -1)) & 1
        return torch.minimum(block, (self.count + coin) // 2)

    def _draw(self, block: Tensor, part: Tensor, causal: bool) -> Tensor:
        """The block that a block draws of one part of those before it."""
        parts = self._parts(block, causal).clamp_min(1)
        low = part * block // parts
        size = (part + 1) * block // parts - low
        return low + _hash(self.seed, block, part) % size.clamp_min(1)

    def _drew(self, late: Tensor, early: Tensor, causal: bool) -> Tensor:
        parts = self._parts(late, causal)
        part = ((early + 1) * parts - 1) // late.clamp_min(1)  # the one in which `early` lies
        drawn = self._draw(late, part, causal)
        return (early < late) & (parts > 0) & (drawn == early)

    def _drawers(self, block: Tensor, part: Tensor, first: int, last: int) -> Tensor:
        """Which blocks from `first` to `last` drew each block: [rows, most], -64 for none."""
        late = torch.arange(first, last + 1, device=block.device)[:, None]
        drawn = self._draw(late, part, causal=False)
        there = part < self._parts(late, causal=False)  # [blocks, count]
        late = late.expand(drawn.shape)[there]
        drawn, order = drawn[there].sort(stable=True)
        late = late[order]  # by what they drew, ascending
        begin = torch.searchsorted(drawn, block)  # [rows, 1]
        end = torch.searchsorted(drawn, block, right=True)
        most = int((end - begin).max()) if len(drawn) else 0
        place = begin + torch.arange(most, device=block.device)
        return late[place.clamp_max(max(len(late) - 1, 0))].where(place < end, -PAGE)


def _hash(seed: int, block: Tensor, part: Tensor) -> Tensor:
    """int64 of 32 bits that look random, a function of the three."""
    return _mix(_mix(_mix(torch.full_like(block, seed)) ^ (block & LOW)) ^ (part & LOW))


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32 bits of which each changes each: Wellons' "hash-prospector"."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD & LOW
    word = (word ^ (word >> 15)) * 0x735A2D97 & LOW
    return word ^ (word >> 15)
