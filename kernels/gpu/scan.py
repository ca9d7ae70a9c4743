"""The scan of all codes: every key's share of the attention, and on which keys a mark falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import sample
from kernels.gpu.codes import estimate, load_factors, load_steps, signed_sums
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
EXACT = tl.constexpr(8388608.0)
"""2 ** 23: added to it, a number is rounded to a whole one, which its lowest bits are."""


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
        scratch.steps, scratch.factors, scratch.centres, scratch.norm, scratch.marks,
        scratch.marked, scratch.counts,
        scratch.norm if shares is None else shares, scratch.norm if masses is None else masses,
        sinks, rows.queries, layout.kv_heads, layout.pages, rows.block_tables.stride(0),
        cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, OCTETS=layout.octets,
        TOGETHER=layout.together, SEGMENT=SEGMENT, STRIDE=STRIDE, PAGE=PAGE,
        SHARES=shares is not None, MASSES=masses is not None,
        num_warps=1, num_stages=3, maxnreg=128,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["sinks", "queries", "kv_heads", "pages", "table_stride", "cache_pages"]
)
def _scan(
    codes, scales, tables, starts, lengths, steps, factors, centres, norm, marks,
    marked, counts, shares, masses,
    sinks, queries, kv_heads, pages, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, OCTETS: tl.constexpr, TOGETHER: tl.constexpr,
    SEGMENT: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, SHARES: tl.constexpr,
    MASSES: tl.constexpr,
):  # fmt: skip
    """One segment of one line."""
    line, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    stop = tl.maximum(length // PAGE - 1, 0)
    columns: tl.constexpr = TOGETHER * PADDED
    deep: tl.constexpr = TOGETHER * OCTETS
    together: tl.constexpr = TOGETHER * PAGE
    key, octet, column = tl.arange(0, PAGE), tl.arange(0, deep), tl.arange(0, columns)
    place = line * tl.num_programs(1) + segment
    number = tl.load(marks + line)
    low = tl.maximum(segment * SEGMENT, start // PAGE // TOGETHER * TOGETHER)
    high = tl.where(number == 0, 0, tl.minimum((segment + 1) * SEGMENT, stop))
    head = column % PADDED
    line_steps, line_factors = (
        load_steps(steps, line, deep, columns),
        load_factors(factors, line, head, PADDED),
    )
    whole = tl.load(norm + line * PADDED + head)
    stretch = number.to(tl.float32) / GROUP
    table = tables + (row // queries) * table_stride
    codes += kv_head * cache_pages * (OCTETS * PAGE)
    scales += kv_head * cache_pages * PAGE
    centres += line * pages * PADDED
    # Where in a page's codes each byte lies: words of 8 bytes, one word of all keys after another.
    inner = (octet % OCTETS // 8 * (PAGE * 8) + octet % 8)[None] + key[:, None] * 8
    # In the order of the line: page by page, 8 keys apart.
    turn = tl.arange(0, together)
    turned = (
        turn // PAGE * PAGE + turn % (PAGE // STRIDE) * STRIDE + turn // (PAGE // STRIDE) % STRIDE
    )
    end_of_line = ((segment * STEP + kv_head.to(tl.int32) * TURN) >> DROPPED) & (CERTAIN - 1)
    by_head = tl.zeros((columns,), tl.float32)
    for page in range(low, high, TOGETHER):
        cached = tl.load(table + page + octet // OCTETS, page + octet // OCTETS < high, 0)
        data = cached[None] * (OCTETS * PAGE) + inner
        data = tl.max_contiguous(tl.multiple_of(data, (1, 8)), (1, 8))
        data = tl.load(codes + data)  # [64, deep]
        for beside in tl.static_range(TOGETHER):
            cached = tl.load(table + tl.minimum(page + beside, high - 1))
            one = tl.load(scales + cached * PAGE + key).to(tl.float32)
            if beside == 0:
                size = tl.broadcast_to(one[:, None], (PAGE, columns))
            else:
                size = tl.where((column // PADDED == beside)[None], one[:, None], size)
        there = page + column // PADDED < high
        centre = tl.load(centres + page * PADDED + column, there, float("-inf")) - whole
        score = estimate(signed_sums(data, line_steps), size, line_factors, centre[None])
        if tl.maximum(start, sinks) > page * PAGE:
            position = (page + column // PADDED)[None] * PAGE + key[:, None]
            score = tl.where((position >= start) & (position >= sinks), score, float("-inf"))
        mass = tl.reshape(tl.exp2(score), (PAGE, TOGETHER, PADDED))
        if MASSES:
            by_head += tl.sum(tl.reshape(mass, (PAGE, columns)), 0)
        share = tl.sum(mass, 2)  # [64, TOGETHER]
        read = share * stretch  # probability that a key is read
        read = tl.where(read < 1.0, read, 1.0)  # also what is no number
        inside = (read * (1.0 * CERTAIN) + EXACT).to(tl.int32, bitcast=True) & (2 * CERTAIN - 1)
        if number < 0:
            own = page + tl.arange(0, TOGETHER)
            position = own[None] * PAGE + key[:, None]
            free = (position >= start) & (position >= sinks) & (own < high)[None]
            inside = tl.where(free, CERTAIN, 0)
        if SHARES:
            own = page + tl.arange(0, TOGETHER)
            target = shares + line * pages * PAGE + own[None] * PAGE + key[:, None]
            tl.store(target, share / GROUP, (own < high)[None] & (key >= 0)[:, None])
        ordered = tl.reshape(inside, (PAGE // STRIDE, STRIDE, TOGETHER))
        ordered = tl.reshape(tl.permute(ordered, (2, 1, 0)), (together,))
        after = end_of_line + tl.cumsum(ordered, 0)
        slot = (after - ordered) >> BITS
        met = (after >> BITS) > slot
        where = (page - segment * SEGMENT) * PAGE + turned
        target = marked + place * (SEGMENT * PAGE) + slot
        tl.store(target, where | (ordered << PLACE_BITS), met)
        end_of_line = tl.max(after, 0)
    if MASSES:
        by_head = tl.sum(tl.reshape(by_head, (TOGETHER, PADDED)), 0)
        tl.store(masses + place * PADDED + tl.arange(0, PADDED), by_head)
    tl.store(counts + place, end_of_line >> BITS)
