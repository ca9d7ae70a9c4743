"""Exact scores of each row's recent window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import splits_for, tile_of
from kernels.gpu.spans import NEAR
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

BLOCK = 64
"""Keys that a program reads at once."""


def score_recent(
    query: Tensor, cache: LayerCache, rows: Rows, stops: Tensor, scale: float
) -> Tensor:
    """Scores of the recent window.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype, contiguous.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        stops: int64 [rows], where the window begins.
        scale: factor on the scores.

    Returns:
        float32 [rows, kv_heads, group, 128], -inf where a row does not see a key.
    """
    count, heads, head_dim = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    blocks = NEAR // BLOCK
    splits = splits_for(count * kv_heads, blocks)
    scores = torch.empty(count, kv_heads, group, NEAR, device=query.device)
    _score[count, kv_heads, splits](
        query, cache.kv, rows.block_tables, rows.starts, stops, rows.lengths, scores, scale,
        rows.queries, rows.block_tables.stride(0), cache.kv.shape[1], -(-blocks // splits),
        GROUP=group, TILE=tile_of(group), DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        NEAR=NEAR, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["queries", "table_stride", "cache_pages", "blocks"])
def _score(
    query, kv, tables, starts, stops, lengths, scores, scale,
    queries, table_stride, cache_pages, blocks,
    GROUP: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    NEAR: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One row and KV head against a split of the window."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    line = row * tl.num_programs(1) + kv_head
    head, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    wide = (head < GROUP)[:, None] & (channel < DIM)[None]
    mine = tl.load(query + (line * GROUP + head[:, None]) * DIM + channel[None], wide, 0.0)
    table = tables + (row // queries) * table_stride
    base = kv_head.to(tl.int64) * cache_pages * PAGE
    start, stop = tl.load(starts + row), tl.load(lengths + row)
    first = tl.load(stops + row)
    low = split * blocks * BLOCK
    for block in range(low, min(low + blocks * BLOCK, NEAR), BLOCK):
        key = block + tl.arange(0, BLOCK)
        position = first + key
        seen = (position >= start) & (position < stop)
        page = tl.load(table + position // PAGE, seen, 0)
        slot = base + page * PAGE + position % PAGE
        data = tl.load(
            kv + slot[:, None] * (2 * DIM) + channel[None],
            seen[:, None] & (channel < DIM)[None],
            0.0,
        )  # [BLOCK, WIDTH]
        score = tl.dot(mine, tl.trans(data), input_precision="ieee") * scale  # [TILE, BLOCK]
        score = tl.where(seen[None], score, float("-inf"))
        place = (line * GROUP + head[:, None]) * NEAR + key[None]
        tl.store(scores + place, score, (head < GROUP)[:, None] & (key < NEAR)[None])
