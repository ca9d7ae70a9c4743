"""Attention of single query rows to the keys that their marks met, and to those always read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import sample
from kernels.gpu import overlap
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.layout import HELD
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

BLOCK = tl.constexpr(16)
"""Keys that are read at once."""
EACH = tl.constexpr(32)
"""Keys of a program that reads keys always read."""
CERTAIN = tl.constexpr(1 << sample.BITS)
"""Length of a key that is read for certain."""
POSITION_BITS = tl.constexpr(32)
"""Of a key's position; its length stands above."""
POSITIONS = tl.constexpr((1 << 32) - 1)


@dataclass(frozen=True, slots=True)
class Look:
    """Attention to the keys that a scan meets."""

    query: Tensor  # [rows, heads, head_dim]  contiguous, of the cache's dtype
    scale: float
    outputs: Tensor  # [rows, heads, splits, head_dim]  a line's program each, of the query's dtype
    lses: Tensor  # float32 [rows, heads, splits]  to base 2, each key counted 1 / p times
    owns: Tensor  # likewise, each key counted once

    @staticmethod
    def of(query: Tensor, scale: float, layout: Layout) -> Look:
        """Memory for all programs' parts."""
        splits = layout.spans * layout.parts + HELD // EACH
        outputs = query.new_empty(*query.shape[:2], splits, query.shape[2])
        lses = torch.empty(2, *query.shape[:2], splits, device=query.device)
        return Look(query, scale, outputs, lses[0], lses[1])


def look(
    cache: LayerCache, rows: Rows, sinks: int, layout: Layout, scratch: Scratch, parts: Look
) -> None:
    """Attend to what a scan has met."""
    overlaps = overlap.possible(parts.query.device)
    _look[layout.lines, parts.outputs.shape[2]](
        parts.query, cache.kv, rows.block_tables, rows.starts, rows.lengths, slopes_of(cache),
        scratch.marks, scratch.marked, scratch.slots, scratch.counts,
        parts.outputs, parts.lses, parts.owns,
        parts.scale * LOG2E.value, sinks, rows.queries, layout.kv_heads, layout.spans,
        layout.parts, scratch.slots.shape[2], rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, HEADS=max(8, layout.padded), DIM=layout.head_dim,
        WIDTH=triton.next_power_of_2(layout.head_dim), EACH=EACH, BLOCK=BLOCK, PAGE=PAGE,
        BIASED=cache.slopes is not None, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=1, num_stages=1, maxnreg=128,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "sinks", "queries", "kv_heads", "spans", "parts", "places", "table_stride", "cache_pages"
    ]
)  # fmt: skip
def _look(
    query, kv, tables, starts, lengths, slopes, marks, marked, slots, counts, outputs, lses, owns,
    scale, sinks, queries, kv_heads, spans, parts, places, table_stride, cache_pages,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, BIASED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One line over a part of what was met in a span, or some of the keys always read."""
    overlap.begin(OVERLAP)
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    overlap.wait(OVERLAP)
    span = split // parts
    place = line * spans + span
    look_here(
        query + line * (GROUP * DIM), kv + kv_head * cache_pages * (PAGE * 2 * DIM),
        tables + (row // queries) * table_stride, marked + place * places, slots + place * places,
        slopes + kv_head * GROUP, outputs, lses, owns, scale, line * GROUP, split, spans, parts,
        start, length, tl.load(marks + line) == 0, tl.load(counts + place, span < spans, 0), sinks,
        GROUP, HEADS, DIM, WIDTH, EACH, BLOCK, PAGE, BIASED,
    )  # fmt: skip


@triton.jit
def look_here(
    query, kv, table, marked, slots, slopes, outputs, lses, owns, scale,
    first_head, split, spans, parts, start, length, lost, noted, sinks,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Attention of one line to the keys that its marks met here, or to some always read.

    Keys are the rows of the products and heads their columns: few heads would leave most rows of a
    tensor core's product empty.
    """
    head, channel, member = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    inside, there = channel < DIM, head < GROUP
    wide = inside[:, None] & there[None]
    # Sinks, the recent window's two pages, or what was met.
    part, met_here = split - spans * parts, split + 0 * member < spans * parts  # [BLOCK]
    stop = tl.maximum(length // PAGE - 1, 0) * PAGE
    always = tl.where(part < PAGE // EACH, 0, stop - PAGE) + part * EACH
    end = tl.where(part < PAGE // EACH, tl.minimum(stop, sinks), length)
    drawn = split < spans * parts
    total, each = tl.where(drawn, noted, EACH), tl.where(drawn, parts, 1) * BLOCK
    begin = tl.where(drawn, split % parts, 0) * BLOCK
    # Where the mass is not finite nothing was drawn, and that shows.
    plain = tl.where(lost, float("nan"), CERTAIN * 1.0)
    mine = tl.load(query + head[None] * DIM + channel[:, None], wide, 0.0)  # [WIDTH, HEADS]
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    mass, own_mass = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((WIDTH, HEADS), tl.float32)
    met = tl.load(slots + begin + member, met_here & (begin + member < total), 0)
    note = tl.load(marked + begin + member, met_here & (begin + member < total), 0)
    for block in range(begin, total, each):
        place = block + member
        position = always + place
        seen = tl.where(met_here, place < total, (position >= start) & (position < end))
        page = tl.load(table + position // PAGE, seen & ~met_here, 0).to(tl.int32)
        slot = tl.where(met_here, met, page * PAGE + position % PAGE)
        size = (note >> POSITION_BITS).to(tl.float32)
        size = tl.where(seen & met_here, size, plain)
        own, more = note, met_here & (place + each < total)
        met = tl.load(slots + place + each, more, 0)
        note = tl.load(marked + place + each, more, 0)
        data = kv + slot.to(tl.int64)[:, None] * (2 * DIM) + channel[None]
        keys = tl.load(data, seen[:, None] & inside[None], 0.0)  # [BLOCK, WIDTH]
        values = tl.load(data + DIM, seen[:, None] & inside[None], 0.0)
        score = tl.dot(keys, mine, input_precision="ieee") * scale  # [BLOCK, HEADS]
        if BIASED:
            position = tl.where(met_here, (own & POSITIONS).to(tl.int32), position)
            distance = (position - (length - 1)).to(tl.float32)
            score += load_slopes(slopes, 0, head, GROUP)[None] * distance[:, None]
        # Each key counts 1 / p times.
        score = tl.where(seen[:, None], score - tl.log2(size / CERTAIN)[:, None], float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - safe)
        share = tl.exp2(score - safe[None])
        mass = mass * shrink + tl.sum(share, 0)
        own_mass = own_mass * shrink + tl.sum(share * size[:, None], 0)
        sums = tl.dot(
            tl.trans(values), share.to(values.dtype), sums * shrink[None], input_precision="ieee"
        )
        peak = higher
    place = (first_head + head) * tl.num_programs(1) + split
    output = sums / tl.where(mass == 0.0, 1.0, mass)[None]
    output = output.to(outputs.dtype.element_ty)
    tl.store(outputs + place[None] * DIM + channel[:, None], output, wide)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(lses + place, peak + tl.log2(mass), there)
    tl.store(owns + place, peak + tl.log2(own_mass / CERTAIN), there)
