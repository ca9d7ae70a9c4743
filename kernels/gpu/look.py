"""Attention of single query rows to the keys that their marks met, and to those always read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu import overlap
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import log2
from kernels.gpu.launch import mostly_cache
from kernels.gpu.layout import CERTAIN, HELD, SLOT_BITS, SLOTS
from kernels.gpu.look_lanes import look_in_lanes
from kernels.gpu.prepare import LOG2E
from kernels.gpu.softmax import finite
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

BLOCK = 16
"""Keys that a warp reads at once."""
REGISTERS = 128
"""Of a thread, at the most: how many programs a multiprocessor has room for."""
MOST_HEADS = 16
"""Of a group, that are looked for in lanes."""
EACH = 32
"""Keys of a program that reads keys always read."""


@dataclass(frozen=True, slots=True)
class Look:
    """Attention to the keys that a scan meets."""

    query: Tensor  # [rows, heads, head_dim]  contiguous, of the cache's dtype
    scale: float
    outputs: Tensor  # [rows, heads, splits, head_dim]  of the query's dtype
    lses: Tensor  # float32 [rows, heads, splits]  to base 2, each key counted 1 / p times
    owns: Tensor  # likewise, each key counted once
    lanes: bool  # whether each warp leaves a part, not each program
    joined: int  # programs of the scan whose keys one program reads

    @staticmethod
    def of(query: Tensor, scale: float, layout: Layout, warps: int | None) -> Look:
        """Memory for the parts of all programs.

        `warps` are those of the scan's programs, where these read the keys they meet; else None.
        """
        lanes = query.itemsize == 2 and layout.head_dim % 64 == 0 and layout.group <= MOST_HEADS
        joined = layout.joined if lanes and warps is None else 1
        splits = -(-layout.spans // joined) * layout.parts + HELD // EACH
        splits *= (warps or 1) if lanes else 1
        outputs = query.new_empty(*query.shape[:2], splits, query.shape[2])
        lses = torch.empty(2, *query.shape[:2], splits, device=query.device)
        return Look(query, scale, outputs, lses[0], lses[1], lanes, joined)

    def words(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors as they are read and written: in lanes by words of two channels."""
        return [x.view(torch.int32) if self.lanes else x for x in tensors]


def look(
    cache: LayerCache,
    rows: Rows,
    layout: Layout,
    scratch: Scratch,
    parts: Look,
    positions: Tensor | None,
) -> None:
    """Attend to what a scan has met.

    Args:
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        layout: the launch's sizes.
        scratch: what the scan left.
        parts: memory for what is found.
        positions: of the keys met, where the cache's scores depend on distance.
    """
    overlaps = overlap.possible(parts.query.device)
    query, kv, outputs = parts.words(parts.query, cache.kv, parts.outputs)
    kernel = _look[layout.kv_heads, len(rows.lengths), parts.outputs.shape[2]](
        query, kv, rows.starts, rows.lengths, slopes_of(cache), scratch.marks,
        scratch.met, scratch.counts if positions is None else positions, scratch.counts,
        scratch.always, outputs, parts.lses, parts.owns,
        parts.scale * LOG2E.value, layout.spans, layout.parts, scratch.met.shape[2],
        cache.kv.shape[1],
        GROUP=layout.group, HEADS=max(8, layout.padded), DIM=layout.head_dim,
        WIDTH=triton.next_power_of_2(layout.head_dim), HELD=HELD, EACH=EACH, BLOCK=BLOCK,
        PAGE=PAGE, BIASED=cache.slopes is not None, LANES=parts.lanes, JOINED=parts.joined,
        BFLOAT=parts.query.dtype == torch.bfloat16, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=1, num_stages=1, maxnreg=REGISTERS,
    )  # fmt: skip
    mostly_cache(kernel)


@triton.jit(do_not_specialize=["spans", "parts", "places", "cache_pages"])
def _look(
    query, kv, starts, lengths, slopes, marks, met, positions, counts, always, outputs, lses, owns,
    scale, spans, parts, places, cache_pages,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    BIASED: tl.constexpr, LANES: tl.constexpr, JOINED: tl.constexpr, BFLOAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One line over a part of what was met in a span, or in two, or some keys always read."""
    overlap.begin(OVERLAP)
    kv_head, row, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    line = row * tl.num_programs(0) + kv_head
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    # Not for the whole scan, whose last programs leave room for others.
    lists = (spans + JOINED - 1) // JOINED
    drawn = split < lists * parts
    span = tl.where(drawn, split // parts * JOINED, 0)
    place = line * spans + span
    noted = overlap.published(counts + place)
    first, gap = noted, 0  # keys of the first of two, and how far behind them the others lie
    if JOINED > 1:
        more = span + 1 < spans
        other = overlap.published(counts + place + tl.where(more, 1, 0))
        noted, gap = first + tl.where(more, other, 0), places - first
    lost = tl.load(marks + line) == 0
    wide: tl.constexpr = DIM // 2 if LANES else DIM
    query += line * (GROUP * wide)
    kv += kv_head * cache_pages * (PAGE * 2 * wide)
    met += place * places
    positions += place * places
    always += line * HELD
    slopes += kv_head * GROUP
    if LANES:
        look_in_lanes(
            query, kv, met, positions, always, slopes, outputs, lses, owns, scale, line * GROUP,
            split, tl.num_programs(2), lists, parts, start, length, lost, noted, first, gap,
            GROUP, DIM, EACH, PAGE, JOINED, BIASED, BFLOAT, 1,
        )  # fmt: skip
    else:
        look_here(
            query, kv, met, positions, always, slopes, outputs, lses, owns, scale, line * GROUP,
            split, tl.num_programs(2), spans, parts, start, length, lost, noted,
            GROUP, HEADS, DIM, WIDTH, EACH, BLOCK, PAGE, BIASED,
        )  # fmt: skip


@triton.jit
def always_read(start, length, sinks, PAGE: tl.constexpr):
    """How many keys are always read: sinks that a row sees, and its recent window."""
    stop = tl.maximum(length // PAGE - 1, 0) * PAGE
    early = tl.maximum(tl.minimum(stop, sinks) - start, 0)
    return early + length - tl.maximum(start, stop)


@triton.jit
def look_here(
    query, kv, met, positions, always, slopes, outputs, lses, owns, scale,
    first_head, split, splits, spans, parts, start, length, lost, noted,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Attention of one line to the keys that its marks met here, or to some always read.

    Keys are the rows of the products and heads their columns: few heads would leave most rows of a
    tensor core's product empty.
    """
    head, channel, member = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    there = head < GROUP
    wide = (channel < DIM)[:, None] & there[None]
    drawn, part = split < spans * parts, split - spans * parts
    notes = tl.where(drawn, met, always)
    begin = tl.where(drawn, split % parts * BLOCK, part * EACH)
    end = tl.where(drawn, noted, tl.where(length > start, part * EACH + EACH, 0))
    each = tl.where(drawn, parts * BLOCK, BLOCK)
    mine = tl.load(query + head[None] * DIM + channel[:, None], wide, 0.0)  # [WIDTH, HEADS]
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    mass, own_mass = tl.zeros((BLOCK, HEADS), tl.float32), tl.zeros((BLOCK, HEADS), tl.float32)
    sums = tl.zeros((WIDTH, HEADS), tl.float32)
    # Behind the last key it is read again, and counts nothing: that asks for no mask.
    last = tl.maximum(end - 1, 0)
    for block in range(begin, end, each):
        place = block + member
        note = tl.load(notes + tl.minimum(place, last))
        size = tl.where(place < end, (note >> SLOT_BITS).to(tl.int32).to(tl.float32), 0.0)
        data = kv + (note & SLOTS)[:, None] * (2 * DIM) + channel[None]
        if DIM == WIDTH:
            keys, values = tl.load(data), tl.load(data + DIM)  # [BLOCK, WIDTH]
        else:
            keys = tl.load(data, (channel < DIM)[None], 0.0)
            values = tl.load(data + DIM, (channel < DIM)[None], 0.0)
        score = tl.dot(keys, mine, input_precision="ieee") * scale  # [BLOCK, HEADS]
        if BIASED:
            window = tl.maximum(length // PAGE - 1, 0) * PAGE - PAGE
            position = tl.where(place < PAGE, place, window + place)
            position = tl.load(positions + place, place < tl.where(drawn, end, 0), position)
            distance = (position - (length - 1)).to(tl.float32)
            score += load_slopes(slopes, 0, head, GROUP)[None] * distance[:, None]
        # Each key counts 1 / p times.
        score -= log2(size * (1.0 / CERTAIN))[:, None]
        score = tl.where((size > 0.0)[:, None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        safe = finite(higher)
        shrink = tl.exp2(peak - safe)
        share = tl.exp2(score - safe[None])
        mass = mass * shrink[None] + share
        own_mass = own_mass * shrink[None] + share * size[:, None]
        sums = tl.dot(
            tl.trans(values), share.to(values.dtype), sums * shrink[None], input_precision="ieee"
        )
        peak = higher
    # Where the mass is not finite nothing was drawn, and that shows.
    extra = tl.where(lost, float("nan"), 0.0)
    mass, own_mass = tl.sum(mass, 0) + extra, tl.sum(own_mass, 0) + extra
    place = (first_head + head) * splits + split
    output = sums * (1.0 / tl.where(mass == 0.0, 1.0, mass))[None]
    output = output.to(outputs.dtype.element_ty)
    tl.store(outputs + place[None] * DIM + channel[:, None], output, wide)
    peak = finite(peak)
    tl.store(lses + place, peak + log2(mass), there)
    tl.store(owns + place, peak + log2(own_mass * (1.0 / CERTAIN)), there)
