"""Attention of single query rows over the paged cache: over selected keys, or over all.

Split over the keys: `kernels.gpu.parts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kernels.gpu import overlap
from kernels.gpu.distance import bias_at, load_slopes, slopes_of
from kernels.gpu.launch import MULTIPROCESSORS, splits_for, tile_of
from kernels.gpu.parts import Parts, leave
from kernels.gpu.prepare import LOG2E
from kernels.gpu.softmax import add_scores, grow_scores, lse_of
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection

BLOCK = 64
"""Selected keys that a program reads at once."""
RUN_BYTES = 128 * 256
"""Keys that a dense program reads at once, and as many of values."""
RESIDENT = 2 * MULTIPROCESSORS
"""Dense programs that a GPU has room for: all begin and end together."""
ALONE = 2
"""Blocks that one dense program reads sooner than parts of them are joined."""


def selected_attention(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.attention.selected_attention`."""
    count, heads, head_dim = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    capacity = selection.indices.shape[-1]
    blocks = max(1, -(-capacity // BLOCK))
    splits = splits_for(count * kv_heads, blocks)
    weights = selection.log_weight
    parts = Parts.of(query, splits, weighted=weights is not None)
    _selected[count, kv_heads, splits](
        query.contiguous(), cache.kv, rows.block_tables, selection.indices.contiguous(),
        parts.lses if weights is None else weights.contiguous(),
        selection.counts.contiguous(), rows.lengths, slopes_of(cache), parts.outputs, parts.lses,
        parts.owns, scale,
        rows.queries, capacity, rows.block_tables.stride(0), cache.kv.shape[1],
        -(-blocks // splits),
        GROUP=group, TILE=tile_of(group), DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        WEIGHTED=weights is not None, BIASED=cache.slopes is not None, BLOCK=BLOCK, PAGE=PAGE,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts.joined(query.dtype)


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.attention.dense_decode`."""
    heads, head_dim = query.shape[1:]
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    tile = tile_of(group)
    tiles = rows.sequences * -(-rows.queries // (tile // group))
    width = triton.next_power_of_2(head_dim)
    block = max(16, min(128, RUN_BYTES // (width * query.itemsize)))
    blocks = -(-rows.block_tables.shape[1] * PAGE // block)
    splits = _dense_splits(blocks, tiles * kv_heads)
    parts = Parts.of(query, splits, weighted=False)
    # Programs that begin early are not as evenly spread: only where each has little to read.
    overlaps = splits in (1, blocks) and overlap.possible(query.device)
    _dense[tiles, kv_heads, splits](
        query.contiguous(), cache.kv, rows.block_tables, rows.starts, rows.lengths,
        slopes_of(cache), parts.outputs, parts.lses, scale,
        rows.queries, rows.block_tables.stride(0), cache.kv.shape[1], -(-blocks // splits),
        GROUP=group, TOGETHER=tile // group, TILE=tile, DIM=head_dim, WIDTH=width, BLOCK=block,
        BIASED=cache.slopes is not None, PAGE=PAGE, EARLY=splits == blocks and rows.queries == 1,
        OVERLAP=overlaps, launch_pdl=overlaps, num_warps=4, num_stages=2,
    )  # fmt: skip
    return parts.joined(query.dtype)[:2]


def _dense_splits(blocks: int, programs: int) -> int:
    """Into how many parts to split `blocks` blocks that as many programs each read."""
    if blocks <= ALONE:
        return 1
    splits = max(1, min(blocks, RESIDENT // programs))
    return -(-blocks // -(-blocks // splits))  # as few as take the same number of blocks each


@triton.jit(do_not_specialize=["queries", "capacity", "table_stride", "cache_pages", "blocks"])
def _selected(
    query, kv, tables, indices, weights, counts, lengths, slopes, outputs, lses, owns, scale,
    queries, capacity, table_stride, cache_pages, blocks,
    GROUP: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One row and KV head over a split of its selected keys."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    pair = row * tl.num_programs(1) + kv_head
    head, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    line = pair * GROUP + head  # [TILE] of [rows, heads]
    wide = (head < GROUP)[:, None] & (channel < DIM)[None]
    mine = tl.load(query + line[:, None] * DIM + channel[None], wide, 0.0)
    table = tables + (row // queries) * table_stride
    base = kv_head.to(tl.int64) * cache_pages * PAGE
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    own_peak = tl.full((TILE,), float("-inf"), tl.float32)
    own_total = tl.zeros((TILE,), tl.float32)
    count = tl.load(counts + pair).to(tl.int32)
    low = split * blocks * BLOCK
    for block in range(low, tl.minimum(low + blocks * BLOCK, count), BLOCK):
        place = block + tl.arange(0, BLOCK)
        seen = place < count
        position = tl.load(indices + pair * capacity + place, seen, 0)
        page = tl.load(table + position // PAGE, seen, 0)
        data = kv + (base + page * PAGE + position % PAGE)[:, None] * (2 * DIM) + channel[None]
        there = seen[:, None] & (channel < DIM)[None]
        keys = tl.load(data, there, 0.0)  # [BLOCK, WIDTH]
        values = tl.load(data + DIM, there, 0.0)
        score = _score(mine, keys, seen[None], scale)
        if BIASED:
            own = tl.load(lengths + row) - 1
            slope = load_slopes(slopes, kv_head, head, GROUP) / LOG2E
            score += bias_at(slope[:, None], position[None], own)
        if WEIGHTED:
            own_peak, own_total = grow_scores(score, own_peak, own_total)
            score += tl.load(weights + pair * capacity + place, seen, 0.0)[None]
        peak, total, sums = add_scores(score, values, peak, total, sums)
    splits = tl.num_programs(2)
    leave(outputs, lses, line * splits + split, channel, wide, head < GROUP, peak, total, sums, DIM)
    if WEIGHTED:
        tl.store(owns + line * splits + split, lse_of(own_peak, own_total), head < GROUP)


@triton.jit(do_not_specialize=["queries", "table_stride", "cache_pages", "blocks"])
def _dense(
    query, kv, tables, starts, lengths, slopes, outputs, lses, scale,
    queries, table_stride, cache_pages, blocks,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, PAGE: tl.constexpr,
    EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one sequence over a split of the keys that any of them sees.

    Where it is one block of one row's keys, it is loaded while the query is computed: all keys but
    the row's newest have been in the cache since earlier steps.
    """
    overlap.begin(OVERLAP)
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(queries, TOGETHER)
    sequence = tile // tiles
    place, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    number = (tile % tiles) * TOGETHER + place // GROUP  # of the query in its sequence
    there = (place < TOGETHER * GROUP) & (number < queries)
    row = (sequence * queries + number).to(tl.int64)
    line = row * (tl.num_programs(1) * GROUP) + kv_head * GROUP + place % GROUP
    wide = there[:, None] & (channel < DIM)[None]
    start = tl.load(starts + row, there, 1 << 40)
    stop = tl.load(lengths + row, there, 0)
    table = tables + sequence * table_stride
    base = kv_head.to(tl.int64) * cache_pages * PAGE
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    begin, end = tl.min(start, 0).to(tl.int32), tl.max(stop, 0).to(tl.int32)
    data = kv + base * (2 * DIM) + channel
    low, high = split * blocks * BLOCK, tl.minimum((split + 1) * blocks * BLOCK, end)
    if EARLY:
        keys, values = _load_pairs(data, table, low, begin, end - 1, channel, DIM, BLOCK, PAGE)
        newest = tl.maximum(end - 1, 0)
        fresh = data + (tl.load(table + newest // PAGE) * PAGE + newest % PAGE) * (2 * DIM)
        overlap.wait(OVERLAP)
        mine = tl.load(query + line[:, None] * DIM + channel[None], wide, 0.0)  # [TILE, WIDTH]
        own = (low <= newest) & (newest < high)
        here = tl.where(own, channel < DIM, False)
        key = tl.load(fresh, here, 0.0).to(tl.float32)
        score = tl.sum(mine.to(tl.float32) * key[None], 1) * scale
        peak = tl.where(own, score, float("-inf"))
        total = tl.where(own, tl.full((TILE,), 1.0, tl.float32), 0.0)
        value = tl.load(fresh + DIM, here, 0.0)
        sums += value.to(tl.float32)[None]
        score = _seen_scores(
            mine, keys, low, start, stop - 1, stop, scale, slopes, kv_head, place,
            GROUP, BLOCK, BIASED,
        )  # fmt: skip
        peak, total, sums = add_scores(score, values, peak, total, sums)
    else:
        overlap.wait(OVERLAP)
        mine = tl.load(query + line[:, None] * DIM + channel[None], wide, 0.0)
        for block in range(tl.maximum(low, begin // BLOCK * BLOCK), high, BLOCK):
            keys, values = _load_pairs(data, table, block, begin, end, channel, DIM, BLOCK, PAGE)
            score = _seen_scores(
                mine, keys, block, start, stop, stop, scale, slopes, kv_head, place,
                GROUP, BLOCK, BIASED,
            )  # fmt: skip
            peak, total, sums = add_scores(score, values, peak, total, sums)
    target = line * tl.num_programs(2) + split
    leave(outputs, lses, target, channel, wide, there, peak, total, sums, DIM)


@triton.jit
def _load_pairs(
    data, table, block, begin, end, channel,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Keys and values from position `block` on, [BLOCK, WIDTH] each; 0 where there are none."""
    position = block + tl.arange(0, BLOCK)
    page = tl.load(table + position // PAGE, position < end, 0)
    place = data[None] + (page * PAGE + position % PAGE)[:, None] * (2 * DIM)
    there = ((position >= begin) & (position < end))[:, None] & (channel < DIM)[None]
    return tl.load(place, there, 0.0), tl.load(place + DIM, there, 0.0)


@triton.jit
def _seen_scores(
    mine, keys, block, start, stop, length, scale, slopes, kv_head, place,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A tile's scores of keys from position `block` on, those before `stop`: [TILE, BLOCK]."""
    position = block + tl.arange(0, BLOCK)
    seen = (position[None] >= start[:, None]) & (position[None] < stop[:, None])
    score = _score(mine, keys, seen, scale)
    if BIASED:
        slope = load_slopes(slopes, kv_head, place % GROUP, GROUP) / LOG2E
        score += bias_at(slope[:, None], position[None], length[:, None] - 1)
    return score


@triton.jit
def _score(mine, keys, seen, scale):
    """[TILE, BLOCK], -inf where a key is not seen."""
    score = tl.dot(mine, tl.trans(keys), input_precision="ieee") * scale
    return tl.where(seen, score, float("-inf"))
