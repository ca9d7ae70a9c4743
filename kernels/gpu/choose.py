"""The pages that tiles of queries read, by content: two launches, and no wait."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.distance import bias_at, load_slopes, page_of_slope, slopes_of
from kernels.gpu.prepare import LOG2E
from kernels.gpu.summaries import SUMMED, Summaries, score_variance
from kernels.gpu.tiling import Tiling, rows_at
from kernels.page import PAGE
from kernels.prefill import causal_bits
from kernels.tiles import TileSelection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment

TOGETHER = 128
"""Pages that a program scores at once."""
LISTED = 512
"""Pages that a program lists at once."""


def choose(
    query: Tensor, cache: LayerCache, segment: Segment, least: float, scale: float, asked: int
) -> TileSelection:
    """See `kernels.prefill.choose`; of `asked` queries on end the last one is asked."""
    query = query.contiguous()
    kv_heads, device = cache.kv_heads, query.device
    pages, tiles = segment.block_table.shape[0], segment.tiles
    tiling = Tiling.of(query, kv_heads, asked)
    programs = tiles * tiling.units
    summaries = Summaries.of(cache, segment, TOGETHER)
    little = torch.empty(programs, kv_heads, pages, dtype=torch.int8, device=device)
    _little[programs, kv_heads](
        query, cache.kv, summaries.means, summaries.spreads, segment.block_table,
        slopes_of(cache), little,
        scale * LOG2E.value, math.log2(least) if least > 0 else -math.inf, segment.start,
        segment.tokens, pages, summaries.room, cache.kv.shape[1],
        ASKED=asked, SUMMED=SUMMED, TOGETHER=TOGETHER, BIASED=cache.slopes is not None,
        **tiling.launch,
    )  # fmt: skip
    left = torch.empty(tiles, kv_heads, -(-pages // PAGE), dtype=torch.int64, device=device)
    listed = torch.empty(tiles * kv_heads * pages, dtype=torch.int32, device=device)
    masks = torch.empty_like(listed)
    starts = torch.empty(tiles, kv_heads, dtype=torch.int64, device=device)
    counts = torch.empty(2, tiles, kv_heads, dtype=torch.int32, device=device)
    _lists[tiles, kv_heads](
        little, left, listed, masks, starts, counts[0], counts[1], segment.start // PAGE, pages,
        UNITS=tiling.units, LISTED=LISTED, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return TileSelection(
        starts=starts,
        counts=counts[0],
        whole=counts[1],
        pages=listed,
        masks=masks,
        bits=causal_bits(device),
        left=left,
    )


@triton.jit(do_not_specialize=["least", "start", "tokens", "pages", "room", "cache_pages"])
def _little(
    query, kv, means, spreads, table, slopes, little, scale, least, start, tokens, pages, room,
    cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ASKED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SUMMED: tl.constexpr, TOGETHER: tl.constexpr,
    PAGE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """On which pages some queries of a tile find but little of their mass, each of them."""
    unit, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    number, there, line, tile = rows_at(
        unit, kv_head, tl.num_programs(1), start, tokens, GROUP, PADDED, ROWS, PAGE, ASKED
    )
    channel, key = tl.arange(0, WIDTH), tl.arange(0, PAGE)
    inside = channel < DIM
    mine = tl.load(
        query + line[:, None] * DIM + channel[None], there[:, None] & inside[None], 0.0
    )  # [ROWS, WIDTH]
    # The mass: of the own page's keys up to the query, and of the pages before it.
    past = start // PAGE + tile
    stored = (past * PAGE + key < start + tokens)[:, None] & inside[None]
    slot = (kv_head * cache_pages + tl.load(table + past)).to(tl.int64) * PAGE + key
    keys = tl.load(kv + slot[:, None] * (2 * DIM) + channel[None], stored, 0.0)
    near = tl.dot(mine, tl.trans(keys), input_precision="ieee") * scale
    if BIASED:
        slope = load_slopes(slopes, kv_head, tl.arange(0, ROWS) % PADDED, GROUP)
        beyond, even = page_of_slope(slope, PAGE)
        near += bias_at(slope[:, None], key[None], number[:, None])
    near = tl.where(key[None] <= number[:, None], near, float("-inf"))
    peak = tl.max(near, 1)
    total = tl.sum(tl.exp2(near - peak[:, None]), 1)
    first = kv_head * room
    variance = score_variance(mine, spreads + first, past, scale, SUMMED)
    other = tl.arange(0, TOGETHER)
    # To base 2: what a page's mass exceeds its mean's score by, and its error over its mass.
    more = variance * (0.5 * LOG2E) + 6.0
    error = tl.log2((tl.exp(variance) - 1.0) / PAGE) / 2
    if BIASED:
        error = tl.log2((tl.exp(variance) - even) / (even * PAGE)) / 2
    for block in range(0, past, TOGETHER):
        score = tl.dot(mine, tl.trans(means.load([first + block, 0])), input_precision="ieee")
        score = score * scale + more[:, None]
        if BIASED:
            begins = (block + other - past)[None] * PAGE
            score += bias_at(slope[:, None], begins, number[:, None]) + beyond[:, None]
        score = tl.where((block + other < past)[None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        peak = higher
    # A row that is none finds little anywhere, unless no query of the tile is asked; what is not a
    # number does not.
    begin = tl.maximum(start - past * PAGE, 0)
    end = tl.minimum(start + tokens - past * PAGE, PAGE)
    nothing = tl.where(begin // ASKED == end // ASKED, float("-inf"), float("inf"))
    enough = tl.where(there, peak + tl.log2(total) + least - error - more, nothing)
    little += (unit * tl.num_programs(1) + kv_head).to(tl.int64) * pages
    for block in range(0, past, TOGETHER):
        # Pages are the product's rows here, so that most of a page's queries share a thread.
        turned = tl.dot(means.load([first + block, 0]), tl.trans(mine), input_precision="ieee")
        turned = turned * scale
        if BIASED:
            begins = (block + other - past)[:, None] * PAGE
            turned += bias_at(slope[None], begins, number[None]) + beyond[None]
        under = tl.min((turned < enough[None]).to(tl.int32), 1).to(tl.int8)
        tl.store(little + block + other, under, block + other < past)


@triton.jit(do_not_specialize=["first", "pages"])
def _lists(
    little, left, listed, masks, starts, counts, whole, first, pages,
    UNITS: tl.constexpr, LISTED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A tile's pages in a row, ascending; its own is the last. And which pages it leaves."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    pair = tile.to(tl.int64) * tl.num_programs(1) + kv_head
    past, count = first + tile, 0
    for block in range(0, pages, LISTED):
        page = block + tl.arange(0, LISTED)
        leaves = (page > 0) & (page < past - 1)
        for unit in tl.static_range(UNITS):
            one = (tile.to(tl.int64) * UNITS + unit) * tl.num_programs(1) + kv_head
            leaves &= tl.load(little + one * pages + page, leaves, 0) != 0
        bits = tl.reshape(leaves, (LISTED // PAGE, PAGE)).to(tl.int64)
        word = block // PAGE + tl.arange(0, LISTED // PAGE)
        bits = tl.sum(bits << tl.arange(0, PAGE)[None].to(tl.int64), 1)
        tl.store(left + pair * tl.cdiv(pages, PAGE) + word, bits, word * PAGE < pages)
        read = ((page < past) & (leaves == 0)).to(tl.int32)
        place = count + tl.cumsum(read, 0) - read
        tl.store(listed + pair * pages + place, page, read != 0)
        count += tl.sum(read, 0)
    tl.store(listed + pair * pages + count, past)
    tl.store(masks + pair * pages + count, 0)
    tl.store(starts + pair, pair * pages)
    tl.store(counts + pair, count + 1)
    tl.store(whole + pair, count)
