"""Shapes of the selection's kernels: what is compiled in, and what memory they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import budget, sample
from kernels.budget import APART, PROBE
from kernels.codes import words
from kernels.gpu.lanes import HEADS
from kernels.gpu.launch import MULTIPROCESSORS
from kernels.page import PAGE
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

HELD = 3 * PAGE
"""Keys that are always read, with room: a page of sinks, and the recent window's two."""
CERTAIN = tl.constexpr(1 << sample.BITS)
"""Length of a key that is read for certain."""
SLOT_BITS = tl.constexpr(32)
"""Of a key's place in the cache; its length stands above."""
SLOTS = tl.constexpr((1 << 32) - 1)
CHUNK = 16
"""Probed pages of a program."""
PARTS = 32
"""Programs that read what is met on a line, at least."""
SPANS = 512
"""Most programs that share a line's keys: each leaves a part of the output."""
ALONE = 256
"""Programs of a line's scan, at the most, whose keys are read by a program each."""
ROOM = 32 * MULTIPROCESSORS
"""Programs of a scan that a GPU has room for."""


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
    def words(self) -> int:
        """Words of 32 bits of a key's code."""
        return words(self.head_dim)

    @property
    def steps(self) -> int:
        """Products that a key's code takes, of 128 bits each."""
        return -(-self.words // 4)

    @property
    def sets(self) -> int:
        """Sets of heads that are multiplied at once."""
        return -(-self.padded // HEADS)

    @property
    def segments(self) -> int:
        """Lines of marks (`kernels.sample`) of a row."""
        return -(-self.pages // SEGMENT)

    @property
    def span(self) -> int:
        """Segments that a program takes: two where there are more than begin at once."""
        fewest = 2 if self.lines * self.segments > ROOM else 1
        return max(fewest, int(triton.next_power_of_2(-(-self.segments // SPANS))))

    @property
    def spans(self) -> int:
        """Programs that share a line's segments."""
        return -(-self.segments // self.span)

    @property
    def joined(self) -> int:
        """Programs of the scan whose keys one program reads: few keys fall to each of many."""
        return 2 if self.spans > ALONE else 1

    @property
    def chunks(self) -> int:
        """Programs that share a line's probed pages, at the most."""
        near = -(-budget.FAR // (PAGE * CHUNK))
        far = -(-self.pages // (APART * CHUNK))
        # One more where the first page that a row sees is not a chunk's first.
        return min(-(-self.pages // CHUNK), max(near, far) + 1)

    @property
    def parts(self) -> int:
        """Programs that share what is met in a program's segments: fewer where lines are many."""
        return max(1, min(PARTS, ROOM // self.lines) // self.spans)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the kernels leave for each other. Scores are base-2 logs of masses."""

    planes: Tensor  # int32 [lines, sets, steps, 2, 32]  queries' bits, as lanes take them
    factors: Tensor  # float32 [lines, 3, padded]  of a code's sum, of its scale and its square
    held: Tensor  # float32 [lines, padded, HELD]  exact scores of the keys always read
    probes: Tensor  # float32 [lines, chunks * CHUNK, padded, PROBE]  scores of the probed keys
    masses: Tensor  # float32 [lines, chunks, padded]  logs of the probed keys' masses
    always: Tensor  # int64 [lines, HELD]  of these keys what `met` says of others; length 0: none
    norm: Tensor  # float32 [lines, padded]
    marks: Tensor  # int32 [lines]  -1 where all keys are read
    met: Tensor  # int64 [lines, spans, span * SEGMENT * 64]  slot in the cache and length of keys
    counts: Tensor  # int32 [lines, spans]  how many these are, -1 until it is known

    def positions(self) -> Tensor:
        """Memory for the positions of the keys met, int32."""
        return torch.empty_like(self.met, dtype=torch.int32)

    @staticmethod
    def of(layout: Layout, device: torch.device) -> Scratch:
        """Memory for one step's selection in one layer."""
        lines, padded = layout.lines, layout.padded
        chunks = layout.chunks
        places = (lines, layout.spans, layout.span * SEGMENT * PAGE)

        def floats(*size: int) -> Tensor:
            return torch.empty(lines, *size, device=device)

        def whole(*size: int) -> Tensor:
            return torch.empty(lines, *size, dtype=torch.int32, device=device)

        return Scratch(
            planes=whole(layout.sets, layout.steps, 2, 32),
            factors=floats(3, padded),
            held=floats(padded, HELD),
            probes=floats(chunks * CHUNK, padded, PROBE),
            masses=floats(chunks, padded),
            always=torch.empty(lines, HELD, dtype=torch.int64, device=device),
            norm=floats(padded),
            marks=whole(),
            met=torch.empty(places, dtype=torch.int64, device=device),
            counts=whole(layout.spans),
        )
