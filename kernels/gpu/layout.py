"""Shapes of the selection's kernels: what is compiled in, and what memory they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from kernels.budget import PROBE
from kernels.codes import words
from kernels.page import PAGE
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

HELD = 3 * PAGE
"""Keys that are always read, with room: a page of sinks, and the recent window's two."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One launch's sizes. A line is a row and KV head."""

    lines: int
    kv_heads: int
    group: int
    head_dim: int
    pages: int  # that the block table has room for

    @staticmethod
    def of(query: Tensor, cache: LayerCache, rows: Rows) -> Layout:
        """The sizes of a decode step's selection."""
        count, heads, head_dim = query.shape
        kv_heads, pages = cache.kv_heads, rows.block_tables.shape[1]
        return Layout(count * kv_heads, kv_heads, heads // kv_heads, head_dim, pages)

    @property
    def padded(self) -> int:
        """Heads of a group, up to a power of two."""
        return int(triton.next_power_of_2(self.group))

    @property
    def octets(self) -> int:
        """Bytes of a key's code."""
        return 8 * words(self.head_dim)

    @property
    def together(self) -> int:
        """Pages whose codes make a row of a product: 32 bytes of codes and 8 columns at least."""
        return max(1, 32 // self.octets, 8 // self.padded)

    @property
    def segments(self) -> int:
        """Lines of marks (`kernels.sample`) of a row."""
        return -(-self.pages // SEGMENT)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the kernels leave for each other. Scores are base-2 logs of masses."""

    steps: Tensor  # int8 [lines, 8, together * padded, together * octets]  queries by bit
    factors: Tensor  # float32 [lines, 3, padded]  of a code's sum, of its scale and its square
    held: Tensor  # float32 [lines, padded, HELD]  exact scores of the keys always read
    centres: Tensor  # float32 [lines, pages, padded]  scores of the pages' means
    probes: Tensor  # float32 [lines, pages * PROBE, padded]  scores of the probed keys
    norm: Tensor  # float32 [lines, padded]
    marks: Tensor  # int32 [lines]  -1 where all keys are read
    marked: Tensor  # int32 [lines, segments, SEGMENT * 64]  place and length of the keys met
    counts: Tensor  # int32 [lines, segments]  how many these are

    @staticmethod
    def of(layout: Layout, device: torch.device) -> Scratch:
        """Memory for one step's selection in one layer."""
        lines, padded, pages = layout.lines, layout.padded, layout.pages
        wide, deep = layout.together * padded, layout.together * layout.octets

        def floats(*size: int) -> Tensor:
            return torch.empty(lines, *size, device=device)

        def whole(*size: int) -> Tensor:
            return torch.empty(lines, *size, dtype=torch.int32, device=device)

        return Scratch(
            steps=torch.empty(lines, 8, wide, deep, dtype=torch.int8, device=device),
            factors=floats(3, padded),
            held=floats(padded, HELD),
            centres=floats(pages, padded),
            probes=floats(pages * PROBE, padded),
            norm=floats(padded),
            marks=whole(),
            marked=whole(layout.segments, SEGMENT * PAGE),
            counts=whole(layout.segments),
        )
