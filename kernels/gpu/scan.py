"""The scan of all codes: every key's share of the attention, and on which keys a mark falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import sample
from kernels.gpu.codes import INTERPRETED, estimate, load_factors, load_steps, signed_sums
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.page import PAGE, PAGE_BITS
from kernels.sample import SEGMENT, STRIDE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

BITS = tl.constexpr(sample.BITS)
CERTAIN = tl.constexpr(1 << sample.BITS)
"""Length of a key that is read for certain."""
STEP = tl.constexpr(sample.STEP - (1 << 32))  # as int32
TURN = tl.constexpr(sample.TURN - (1 << 32))
DROPPED = tl.constexpr(32 - sample.BITS)
PLACE_BITS = tl.constexpr(PAGE_BITS + SEGMENT.bit_length() - 1)
"""Of a key's place in its segment; its length stands above."""
PLACES = tl.constexpr(SEGMENT * PAGE)
"""Keys of a segment."""
ROUND = tl.constexpr(1.0 * 2**23)
"""Added to it, a number is rounded to a whole one, which its last bits then are."""


def scan(
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    layout: Layout,
    scratch: Scratch,
    shares: Tensor | None = None,
    masses: Tensor | None = None,
) -> None:
    """Score every key that is free, and note those on which a mark falls.

    Args:
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        layout: the launch's sizes.
        scratch: what is read and written.
        shares: float32 [lines, pages * 64], takes every free key's share, where wanted.
        masses: float32 [lines, segments, padded], takes each segment's mass by head, over the norm,
            where wanted.
    """
    _scan[layout.lines, layout.segments](
        cache.codes.view(torch.int8), cache.scale, rows.block_tables, rows.starts, rows.lengths,
        slopes_of(cache), scratch.steps, scratch.factors, scratch.centres, scratch.norm,
        scratch.marks,
        scratch.marked, scratch.counts,
        scratch.norm if shares is None else shares, scratch.norm if masses is None else masses,
        sinks, rows.queries, layout.kv_heads, layout.pages, rows.block_tables.stride(0),
        cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, OCTETS=layout.octets,
        TOGETHER=layout.together, SEGMENT=SEGMENT, STRIDE=STRIDE, PAGE=PAGE,
        SHARES=shares is not None, MASSES=masses is not None, BIASED=cache.slopes is not None,
        num_warps=1, num_stages=2, maxnreg=128,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["sinks", "queries", "kv_heads", "pages", "table_stride", "cache_pages"]
)
def _scan(
    codes, scales, tables, starts, lengths, slopes, steps, factors, centres, norm, marks,
    marked, counts, shares, masses,
    sinks, queries, kv_heads, pages, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, OCTETS: tl.constexpr, TOGETHER: tl.constexpr,
    SEGMENT: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, SHARES: tl.constexpr,
    MASSES: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One segment of one line."""
    line, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    stop = tl.maximum(length // PAGE - 1, 0)
    columns: tl.constexpr = TOGETHER * PADDED
    deep: tl.constexpr = TOGETHER * OCTETS
    key, octet, head = tl.arange(0, PAGE), tl.arange(0, deep), tl.arange(0, PADDED)
    beside, column = tl.arange(0, TOGETHER), tl.arange(0, STRIDE)
    place = line * tl.num_programs(1) + segment
    number = tl.load(marks + line)
    low = tl.maximum(segment * SEGMENT, start // PAGE // TOGETHER * TOGETHER)
    high = tl.where(number == 0, 0, tl.minimum((segment + 1) * SEGMENT, stop))
    first = tl.maximum(start, sinks)  # key that is free
    line_steps = load_steps(steps, line, deep, columns)
    line_factors = load_factors(factors, line, head[None, None], PADDED)
    whole = tl.load(norm + line * PADDED + head)[None]
    # Units of the line for a mass of 1 in one head; where all keys are read, whatever the mass.
    stretch = tl.where(number < 0, float("inf"), number.to(tl.float32) * (CERTAIN / GROUP))
    table = tables + (row // queries) * table_stride
    codes += kv_head * cache_pages * (OCTETS * PAGE)
    scales += kv_head * cache_pages * PAGE
    centres += line * pages * PADDED
    shares += line * pages * PAGE
    marked += place * (SEGMENT * PAGE)
    # Where in a page's codes each byte lies: words of 8 bytes, one word of all keys after another.
    inner = (octet % OCTETS // 8 * (PAGE * 8) + octet % 8)[None] + key[:, None] * 8
    end_of_line = ((segment * STEP + kv_head.to(tl.int32) * TURN) >> DROPPED) & (CERTAIN - 1)
    by_head = tl.zeros((TOGETHER, PADDED), tl.float32)
    for pair in range(low, high, 2 * TOGETHER):
        # Twice, since Triton brings the steps into the order of the products once a turn.
        for half in tl.static_range(2):
            page = pair + half * TOGETHER
            cached = tl.load(table + tl.minimum(page + octet // OCTETS, high - 1))
            data = cached[None] * (OCTETS * PAGE) + inner
            data = tl.max_contiguous(tl.multiple_of(data, (1, 8)), (1, 8))
            data = tl.load(codes + data)  # [64, deep]
            own = tl.minimum(page + beside, high - 1)
            size = scales + (tl.load(table + own) * PAGE)[None] + column[:, None]  # [8, TOGETHER]
            centre = tl.load(centres + own[:, None] * PADDED + head[None]) - whole
            # Keys at the start of a page that are not free, all of a page that is none: by column.
            taken = tl.where(page + beside < high, first - (page + beside) * PAGE, PAGE)
            taken = taken[None] - column[:, None]
            sums = _by_rank(signed_sums(data, line_steps), STRIDE, TOGETHER, PADDED)
            # Keys of a column follow each other on the line.
            lengths_of, ends, end = (), (), tl.zeros((STRIDE, TOGETHER), tl.int32)
            for rank in tl.static_range(PAGE // STRIDE):
                scale = tl.load(size + rank * STRIDE).to(tl.float32)
                score = estimate(sums[rank], scale[:, :, None], line_factors, centre[None])
                if BIASED:
                    slope = load_slopes(slopes, kv_head, head, GROUP)[None, None]
                    score += slope * (column + rank * STRIDE)[:, None, None].to(tl.float32)
                mass = tl.exp2(score)  # [8, TOGETHER, PADDED]
                share = tl.sum(mass, 2)
                free = taken <= rank * STRIDE
                if MASSES:
                    by_head += tl.sum(tl.where(free[:, :, None], mass, 0.0), 0)
                if SHARES:
                    position = (page + beside)[None] * PAGE + rank * STRIDE + column[:, None]
                    share_of = tl.where(free, share / GROUP, 0.0)
                    tl.store(shares + position, share_of, position < high * PAGE)
                # What is no number is the greatest. The last bits are then a whole number.
                drawn = tl.minimum(share * stretch + ROUND, ROUND + CERTAIN)
                drawn = drawn.to(tl.int32, bitcast=True) & (2 * CERTAIN - 1)
                drawn = tl.where(free, drawn, 0)
                end += drawn
                lengths_of += (drawn,)  # type: ignore[assignment]
                ends += (end,)  # type: ignore[assignment]
            # Columns of a page follow each other, and pages.
            total = tl.reshape(tl.trans(end), (TOGETHER * STRIDE,))
            begin = end_of_line + tl.cumsum(total, 0) - total
            begin = tl.trans(tl.reshape(begin, (TOGETHER, STRIDE)))
            place_of = ((page - segment * SEGMENT) + beside)[None] * PAGE + column[:, None]
            for rank in tl.static_range(PAGE // STRIDE):
                after = begin + ends[rank]
                slot = (after - lengths_of[rank]) >> BITS
                note = (place_of + rank * STRIDE) | (lengths_of[rank] << PLACE_BITS)
                _store_where_it_lies(marked + slot, note, after >> BITS, slot)
            end_of_line += tl.sum(total, 0)
    if MASSES:
        by_head = tl.sum(by_head, 0)
        tl.store(masses + place * PADDED + tl.arange(0, PADDED), by_head)
    tl.store(counts + place, end_of_line >> BITS)


@triton.jit
def _by_rank(sums, STRIDE: tl.constexpr, TOGETHER: tl.constexpr, PADDED: tl.constexpr):
    """[64, columns] as 8 tensors [8, TOGETHER, PADDED]: all first keys of the columns, and so on.

    A thread holds keys that lie 8 apart, so that none leaves its thread.
    """
    sums = tl.reshape(sums, (2, 2, 2, STRIDE, TOGETHER, PADDED))
    even, odd = tl.split(tl.permute(sums, (3, 4, 5, 0, 1, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    rank_0, rank_4 = tl.split(a)
    rank_1, rank_5 = tl.split(b)
    rank_2, rank_6 = tl.split(c)
    rank_3, rank_7 = tl.split(d)
    return rank_0, rank_1, rank_2, rank_3, rank_4, rank_5, rank_6, rank_7


@triton.jit
def _store_where_it_lies(pointers, values, one, other):
    """Store where one is more than the other.

    Triton would first bring everything into the order in which memory is written fastest; that
    costs far more than it saves where next to nothing is written.
    """
    if INTERPRETED:
        tl.store(pointers, values, one > other)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $3, $4; @p st.global.b32 [$1], $2; } // $0",
            "=r,l,r,r,r",
            [pointers.to(tl.int64), values, one, other],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
