"""The scan of one-bit codes: an estimated mass of every coded key (`kernels.codes`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.codes import NOISE, rotation, words
from kernels.gpu.launch import splits_for, tile_of
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

PAGES = 16
"""Pages whose means are multiplied at once."""


def scan(
    query: Tensor, cache: LayerCache, rows: Rows, stops: Tensor, first: int, last: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Estimated log-masses of the keys in pages `first` to `last`, and their log-sum-exp by page.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        stops: int64 [rows], where each row's coded keys end; keys in front of `rows.starts` or from
            there on have -inf.
        first: the first page.
        last: the page behind the last, at least one more.
        scale: factor on the scores.

    Returns:
        float32 [rows, heads, keys] and [rows, heads, pages].
    """
    count, heads, head_dim = query.shape
    kv_heads, pages = cache.kv_heads, last - first
    group = heads // kv_heads
    tile = tile_of(group)  # rows of a program: heads of a group, and queries
    together = tile // group
    scaled = query.float() * scale
    turned = (scaled @ rotation(head_dim, torch.float32, query.device)).to(query.dtype)
    penalty = scaled.square().sum(-1) * (NOISE / 2)  # [rows, heads]
    tiles = rows.sequences * -(-rows.queries // together)
    blocks = -(-pages // PAGES)
    splits = splits_for(tiles * kv_heads, blocks)
    scores = scaled.new_empty(count, heads, pages * PAGE)
    page_lse = scaled.new_empty(count, heads, pages)
    _scan[tiles, kv_heads, splits](
        scaled.to(query.dtype),
        turned,
        penalty,
        rows.block_tables,
        rows.starts,
        stops,
        cache.key_mean,
        cache.codes.view(torch.int32),
        cache.scale,
        scores,
        page_lse,
        rows.queries,
        first,
        pages,
        rows.block_tables.stride(0),
        cache.kv.shape[1],
        -(-blocks // splits),
        GROUP=group,
        TOGETHER=together,
        TILE=tile,
        DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        WORDS=2 * words(head_dim),
        PAGES=PAGES,
        PAGE=PAGE,
        num_warps=4,
    )
    return scores, page_lse


@triton.jit(
    do_not_specialize=["queries", "first", "pages", "table_stride", "cache_pages", "blocks"]
)
def _scan(
    query,
    turned,
    penalty,
    tables,
    starts,
    stops,
    means,
    codes,
    scales,
    scores,
    page_lse,
    queries,
    first,
    pages,
    table_stride,
    cache_pages,
    blocks,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
):
    """A tile of query rows against a split of the pages of its sequence."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    tiles = tl.cdiv(queries, TOGETHER)
    sequence = tile // tiles
    place = tl.arange(0, TILE)
    number = (tile % tiles) * TOGETHER + place // GROUP  # of the query in its sequence
    there = (place < TOGETHER * GROUP) & (number < queries)
    row = (sequence * queries + number).to(tl.int64)
    line = row * heads + kv_head * GROUP + place % GROUP  # [TILE] of [rows, heads]
    channel = tl.arange(0, WIDTH)
    wide = there[:, None] & (channel < DIM)[None]
    own = tl.load(query + line[:, None] * DIM + channel[None], wide, 0.0)  # [TILE, WIDTH]
    fine = tl.load(penalty + line, there, 0.0)[:, None]
    start = tl.load(starts + row, there, 0)[:, None]
    stop = tl.load(stops + row, there, 0)[:, None]
    key, bit, column = tl.arange(0, PAGE), tl.arange(0, 32), tl.arange(0, PAGES)
    table = tables + sequence * table_stride + first
    base = kv_head.to(tl.int64) * cache_pages
    low = split * blocks * PAGES
    for block in range(low, min(low + blocks * PAGES, pages), PAGES):
        cached = base + tl.load(table + block + column, block + column < pages, 0)  # [PAGES]
        mean = tl.load(
            means + cached[:, None] * DIM + channel[None], (channel < DIM)[None], 0.0
        )  # [PAGES, WIDTH]
        centres = tl.dot(own, tl.trans(mean), input_precision="ieee")  # [TILE, PAGES]
        for page in range(block, min(block + PAGES, pages)):
            here = base + tl.load(table + page)
            total = tl.zeros((TILE, PAGE), tl.float32)
            for word in tl.static_range(WORDS):
                if word * 32 < DIM:
                    signs = tl.load(
                        codes + (here * (WORDS // 2) + word // 2) * (2 * PAGE) + key * 2 + word % 2
                    )  # [PAGE] of 32 channels
                    signs = _signs((signs[None] >> bit[:, None]) & 1, turned.dtype.element_ty)
                    part = tl.load(
                        turned + line[:, None] * DIM + word * 32 + bit[None],
                        there[:, None] & (word * 32 + bit < DIM)[None],
                        0.0,
                    )  # [TILE, 32]
                    total = tl.dot(part, signs, total, input_precision="ieee")
            centre = tl.sum(tl.where(column[None] == page - block, centres, 0.0), 1)[:, None]
            size = tl.load(scales + here * PAGE + key)[None]
            score = centre + size * (total - fine * size)  # [TILE, PAGE]
            position = (first + page) * PAGE + key[None]
            score = tl.where((position >= start) & (position < stop), score, float("-inf"))
            tl.store(
                scores + line[:, None] * (pages * PAGE) + page * PAGE + key[None],
                score,
                there[:, None],
            )
            peak = tl.max(score, 1)
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            lse = peak + tl.log(tl.sum(tl.exp(score - peak[:, None]), 1))
            tl.store(page_lse + line * pages + page, lse, there)


@triton.jit
def _signs(bits, dtype: tl.constexpr):
    """1 where a bit is set and -1 where it is not, put together from the numbers' own bits.

    Conversions from integers run at a quarter of the speed.
    """
    if dtype == tl.bfloat16:
        signs = ((bits << 15) ^ 0xBF80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        signs = ((bits << 15) ^ 0xBC00).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        signs = ((bits << 31) ^ -0x40800000).to(tl.float32, bitcast=True)
    return signs
