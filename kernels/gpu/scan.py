"""The scan of all codes: every key's share of the attention, and on which keys a mark falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import sample
from kernels.gpu import overlap
from kernels.gpu.centres import centres_of
from kernels.gpu.distance import slopes_of
from kernels.gpu.lanes import load_factors, load_planes, of_lane, own_word
from kernels.gpu.launch import MULTIPROCESSORS, mostly_cache
from kernels.gpu.layout import CERTAIN, HELD
from kernels.gpu.look import EACH, look_here
from kernels.gpu.look_lanes import look_in_lanes
from kernels.gpu.prepare import LOG2E
from kernels.gpu.scan_pages import (
    BITS,
    drawn_of,
    first_pages,
    less_norms,
    load_page,
    middle_of,
    note_pages,
    score_page,
    score_pages,
    taken_keys,
)
from kernels.page import PAGE
from kernels.sample import SEGMENT, STRIDE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch
    from kernels.gpu.look import Look

STEP = tl.constexpr(sample.STEP - (1 << 32))  # as int32
TURN = tl.constexpr(sample.TURN - (1 << 32))
DROPPED = tl.constexpr(32 - sample.BITS)
REGISTERS = (128, 96, 80, 64)
"""Of a thread, at the most: the first that lets all programs begin at once. With fewer some
multiprocessors would take more programs than others.
"""
FILE = 65_536 // 32
"""Registers of a multiprocessor for each thread of a warp."""
DEPTH = tl.constexpr(2)
"""Pages of a warp that are on their way at once, each in registers of its own."""
WARPS = 2
"""Of a program that also reads the keys it meets: few such programs have a GPU to themselves."""


def scan(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    layout: Layout,
    scratch: Scratch,
    *,
    positions: Tensor | None = None,
    shares: Tensor | None = None,
    masses: Tensor | None = None,
    look: Look | None = None,
) -> None:
    """Score every key that is free, and note those on which a mark falls.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        scale: factor on the scores.
        layout: the launch's sizes.
        scratch: what is read and written.
        positions: int32, of the shape of what is met: takes its positions, where wanted.
        shares: float32 [lines, pages * 64], takes every free key's share, where wanted.
        masses: float32 [lines, spans, padded], takes each program's mass by head, over the norm,
            where wanted.
        look: attention to the keys met and to those always read, where wanted.
    """
    overlaps = overlap.possible(cache.codes.device)
    unused, looks = scratch.norm, look is not None
    centres, asked, direct = centres_of(cache, query)
    parts = (unused, cache.kv, unused, unused, unused, unused)
    if look is not None:
        looking, kv, outputs = look.words(look.query, cache.kv, look.outputs)
        parts = (looking, kv, scratch.always, outputs, look.lses, look.owns)
    width = triton.next_power_of_2(layout.head_dim)
    warps = WARPS if looks else 1
    kernel = _scan[layout.lines, layout.spans + (HELD // EACH if looks else 0)](
        cache.codes, cache.scale.view(torch.int32), rows.block_tables, rows.starts, rows.lengths,
        slopes_of(cache), scratch.planes, scratch.factors, asked, centres, scratch.norm,
        scratch.marks, scratch.met, scratch.counts,
        unused if positions is None else positions, unused if shares is None else shares,
        unused if masses is None else masses, *parts,
        scale * LOG2E.value, sinks, rows.queries, layout.kv_heads, layout.pages, layout.spans,
        rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, SETS=layout.sets, STEPS=layout.steps,
        WORDS=layout.words, SPAN=layout.span, SEGMENT=SEGMENT, STRIDE=STRIDE, PAGE=PAGE,
        DIRECT=direct, PLACED=positions is not None, SHARES=shares is not None,
        MASSES=masses is not None,
        LOOKS=looks, HEADS=max(8, layout.padded), DIM=layout.head_dim, WIDTH=width, HELD=HELD,
        EACH=EACH, BLOCK=16 * warps, BYTES=2 * layout.head_dim * cache.kv.itemsize,
        BIASED=cache.slopes is not None, LANES=look is not None and look.lanes,
        BFLOAT=cache.kv.dtype == torch.bfloat16, WARPS=warps, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=warps, num_stages=1,
        maxnreg=registers_for(layout.lines * layout.spans),
    )  # fmt: skip
    mostly_cache(kernel)


def registers_for(programs: int) -> int:
    """Of a thread, where so many programs of one warp are to begin at once."""
    each = -(-programs // MULTIPROCESSORS)
    return next((few for few in REGISTERS if FILE // few >= each), REGISTERS[-1])


@triton.jit(
    do_not_specialize=[
        "sinks", "queries", "kv_heads", "pages", "spans", "table_stride", "cache_pages"
    ]
)  # fmt: skip
def _scan(
    codes, scales, tables, starts, lengths, slopes, planes, factors, asked, centres, norm, marks,
    met, counts, positions, shares, masses, query, kv, always, outputs, lses, owns,
    scale, sinks, queries, kv_heads, pages, spans, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, SETS: tl.constexpr, STEPS: tl.constexpr,
    WORDS: tl.constexpr, SPAN: tl.constexpr, SEGMENT: tl.constexpr, STRIDE: tl.constexpr,
    PAGE: tl.constexpr, DIRECT: tl.constexpr, PLACED: tl.constexpr, SHARES: tl.constexpr,
    MASSES: tl.constexpr,
    LOOKS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr,
    BIASED: tl.constexpr, LANES: tl.constexpr, BFLOAT: tl.constexpr, WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some segments of one line, or some of its keys always read: see `kernels.gpu.lanes`.

    A warp takes a page at a time, whose keys are 8 rows of 8. The products leave what belongs to
    column g in lanes 4 g to 4 g + 3, and the sum over heads leaves two keys in each, so that the
    lanes' keys follow each other as on the line.
    """
    line, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    nothing = (tl.load(lengths + row) >> 48).to(tl.int32)  # 0, which a compiler cannot know
    low = tl.maximum(span * (SPAN * SEGMENT), start // PAGE)
    high = tl.minimum((span + 1) * (SPAN * SEGMENT), tl.maximum(length // PAGE - 1, 0))
    first = tl.maximum(start, sinks)  # key that is free
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    column, member = lane // 4, lane % 4
    table = tables + (row // queries) * table_stride
    codes += kv_head * cache_pages * (WORDS * PAGE) + column * (WORDS * 4)
    codes += own_word(member, WORDS)
    scales += kv_head * cache_pages * (PAGE // 4) + column
    centres += kv_head * cache_pages * (DIM // 4 if DIRECT else DIM)
    shares += line * pages * PAGE
    own_span = line * spans + span
    met += own_span * (SPAN * SEGMENT * PAGE)
    positions += own_span * (SPAN * SEGMENT * PAGE)
    wide: tl.constexpr = DIM // 2 if LANES else DIM
    kv += kv_head * cache_pages * (PAGE * 2 * wide)
    last = tl.maximum(high - 1, 0)
    every: tl.constexpr = DEPTH * WARPS
    together: tl.constexpr = min(SPAN * SEGMENT, 32)  # pages, of one segment or two
    # Pages that were full before this step need not be waited for, nor the query (`_probe`).
    begin = span * (SPAN * SEGMENT)
    owned, pending = first_pages(
        codes, scales, table, begin, low, last, lane, warp, member, STEPS, WORDS, PAGE, every, WARPS
    )
    middles = score_pages(
        centres, asked, owned, begin, line * GROUP, lane, scale, slopes, kv_head, length - 1,
        together, GROUP, SETS, DIM, PAGE, DIRECT, BFLOAT, BIASED,
    )  # fmt: skip
    overlap.wait(OVERLAP)
    overlap.begin(OVERLAP)  # not before: what follows waits for programs of this kernel alone
    number = tl.load(marks + line)
    high = tl.where(number == 0, 0, high)
    # Units of the line for a mass of 1 in one head; where all keys are read, whatever the mass.
    stretch = tl.where(number < 0, float("inf"), number.to(tl.float32) * (CERTAIN / GROUP))
    line_planes, line_factors, wholes = (), (), ()
    for some in tl.static_range(SETS):
        set_planes = planes + (line * SETS + some) * (STEPS * 2 * 32)
        line_planes += (load_planes(set_planes, lane, STEPS),)  # type: ignore[assignment]
        line_factors += (load_factors(factors, line, member, PADDED, some),)  # type: ignore[assignment]
        head = some * 4 + member
        whole = tl.load(norm + line * PADDED + head, head < PADDED, 0.0)
        wholes += (whole,)  # type: ignore[assignment]
    middles = less_norms(middles, wholes, SETS)
    key = member * (2 * STRIDE) + column  # the first of a lane's two
    phase = kv_head.to(tl.int32) * TURN
    by_head = tl.zeros((SETS, 32 * WARPS), tl.float32)
    noted = low * 0
    for part in range(0, SPAN * SEGMENT, together):
        begin = span * (SPAN * SEGMENT) + part
        first_place = tl.maximum(low - begin, 0) // every * every
        end_place = tl.minimum(high - begin, together)
        edge = (begin * PAGE < first) | (begin < low) | (begin + together > high)
        turned = begin // SEGMENT * STEP + phase
        end_of_line = (turned >> DROPPED) & (CERTAIN - 1)
        if together > SEGMENT:
            next_line = ((turned + STEP) >> DROPPED) & (CERTAIN - 1)
            end_of_line = tl.where(first_place > SEGMENT, next_line, end_of_line)
        for place in range(first_place, end_place, every):
            if together > SEGMENT:  # each has a line of its own
                begins = place == SEGMENT
                noted += tl.where(begins, end_of_line >> BITS, 0)
                end_of_line = tl.where(begins, next_line, end_of_line)
            before, pending, found = pending, (), ()
            next_place = tl.minimum(place + every, together - every)
            for turn in tl.static_range(DEPTH):
                page = begin + place + turn * WARPS + warp
                following = next_place + turn * WARPS + warp
                own, words, sizes = before[turn]
                middle = middle_of(middles, place, turn * WARPS + warp, member, SETS)
                taken = taken_keys(page, low, high, first, PAGE)
                total, by_head, last_sums = score_page(
                    words, sizes, line_planes, line_factors, middle, slopes, kv_head, taken,
                    column, member, by_head,
                    GROUP, SETS, STEPS, STRIDE, PAGE, DIRECT, BIASED, MASSES, WARPS,
                )  # fmt: skip
                # Not loaded before the last product is done: what is loaded then takes the place of
                # what was multiplied, and nothing has to be moved.
                later = last_sums.to(tl.int32, bitcast=True) & nothing
                cached = of_lane(owned, following) + later
                words, sizes = load_page(codes, scales, cached, member, STEPS, WORDS, PAGE)
                pending += ((cached, words, sizes),)
                if turn + 1 < DEPTH:  # or a compiler puts all pages' loads behind all products
                    tl.debug_barrier()
                drawn, next_drawn = drawn_of(total[0], stretch), drawn_of(total[2], stretch)
                if edge:
                    drawn = tl.where(key >= taken, drawn, 0)
                    next_drawn = tl.where(key + STRIDE >= taken, next_drawn, 0)
                if SHARES:
                    share, inside = shares + page * PAGE + key, (page >= low) & (page < high)
                    tl.store(share, tl.where(key >= taken, total[0] / GROUP, 0.0), inside)
                    free = key + STRIDE >= taken
                    tl.store(share + STRIDE, tl.where(free, total[2] / GROUP, 0.0), inside)
                found += ((own, page, drawn, next_drawn),)  # type: ignore[assignment]
            begin_of_pages = end_of_line
            for turn in tl.static_range(DEPTH):
                end_of_line += tl.sum(found[turn][2] + found[turn][3], 0)
            # All pages' marks at once: what one waits for another uses.
            if (end_of_line >> BITS) != (begin_of_pages >> BITS):
                note_pages(
                    found, begin_of_pages, noted, met, positions, kv, key, BYTES, wide,
                    STRIDE, PAGE, PLACED, LOOKS and OVERLAP, WARPS,
                )  # fmt: skip
        noted += end_of_line >> BITS
        if together < SPAN * SEGMENT:
            owned, pending = first_pages(
                codes, scales, table, begin + together, low, last, lane, warp, member,
                STEPS, WORDS, PAGE, every, WARPS,
            )  # fmt: skip
            middles = score_pages(
                centres, asked, owned, begin + together, line * GROUP, lane, scale, slopes, kv_head,
                length - 1, together, GROUP, SETS, DIM, PAGE, DIRECT, BFLOAT, BIASED,
            )  # fmt: skip
            middles = less_norms(middles, wholes, SETS)
    if MASSES:
        head = tl.arange(0, SETS)[:, None] * 4 + tl.arange(0, 4)[None]
        mass = tl.sum(tl.reshape(by_head, (SETS, 8 * WARPS, 4)), 1)
        tl.store(masses + own_span * PADDED + head, mass, head < PADDED)
    if span < spans:
        overlap.publish(counts + own_span, noted)
    if LOOKS:
        tl.debug_barrier()
        query += line * (GROUP * wide)
        always += line * HELD
        slopes += kv_head * GROUP
        lost = number == 0
        if LANES:
            look_in_lanes(
                query, kv, met, positions, always, slopes, outputs, lses, owns, scale,
                line * GROUP, span, tl.num_programs(1) * WARPS, spans, 1, start, length, lost,
                noted, noted, 0, GROUP, DIM, EACH, PAGE, 1, BIASED, BFLOAT, WARPS,
            )  # fmt: skip
        else:
            look_here(
                query, kv, met, positions, always, slopes, outputs, lses, owns, scale,
                line * GROUP, span, tl.num_programs(1), spans, 1, start, length, lost, noted,
                GROUP, HEADS, DIM, WIDTH, EACH, BLOCK, PAGE, BIASED,
            )  # fmt: skip
