"""Attention of a prompt's tokens over the pages that their tiles read, and the others' means.

One program has 128 rows, a tile's queries by the heads of a group, and goes through the tile's list
(FlashAttention; Dao 2023, "FlashAttention-2"). Pages seen whole come in by the GPU's copy engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu.distance import bias_at, load_slopes, page_of_slope, slopes_of
from kernels.gpu.prepare import LOG2E
from kernels.gpu.softmax import add_scaled_scores, finite
from kernels.gpu.summaries import SUMMED, Summaries, add_means, score_variance
from kernels.gpu.tiling import Tiling, rows_at
from kernels.page import PAGE
from kernels.tiles import ALIKE, SAMPLES

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tiles import TileSelection

LOCATED = 1024
"""Places of a list that a program looks up at once."""
NARROW = 64
"""Channels up to which products of float32 are three of TF32, as exact and on the tensor cores.

What that keeps of wider heads' keys does not fit into shared memory.
"""


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.prefill.tile_attention`."""
    tokens, heads, head_dim = query.shape
    kv_heads, device, left = cache.kv_heads, query.device, selection.left
    tiles, tiling = selection.counts.shape[0], Tiling.of(query, kv_heads)
    programs = tiles * tiling.units
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lses = torch.empty(2, tokens, heads, device=device)
    blocks = TensorDescriptor.from_tensor(cache.kv.view(-1, 2 * head_dim), [PAGE, tiling.width])
    # Where no means stand for pages, none are read.
    summaries = Summaries(blocks, blocks, lses, 0) if left is None else Summaries.of(cache, segment)
    kinds = torch.empty(programs, kv_heads, dtype=torch.int8, device=device)
    starts, counts = selection.starts.contiguous(), selection.counts.contiguous()
    located = torch.empty_like(selection.pages)
    _locate[tiles, kv_heads](
        selection.pages, starts, counts, segment.block_table, located, BLOCK=LOCATED, num_warps=4
    )
    for sampled in (False,) if left is None else (False, True):
        _tiles[programs, kv_heads](
            query.contiguous(), cache.kv, blocks, summaries.means, summaries.samples,
            summaries.spreads, segment.block_table,
            starts, counts, selection.whole.contiguous(), selection.pages, located,
            selection.masks, selection.bits,
            selection.bits if left is None else left.contiguous(),
            counts if selection.order is None else selection.order,
            slopes_of(cache), kinds, output, lses[0], lses[1],
            scale * LOG2E.value, segment.start, tokens,
            0 if left is None else left.shape[2], summaries.room, cache.kv.shape[1],
            MEANS=left is not None, SAMPLED=sampled, ALIKE=ALIKE, SAMPLES=SAMPLES, SUMMED=SUMMED,
            BIASED=cache.slopes is not None, ORDERED=selection.order is not None,
            PRECISION="tf32x3" if tiling.width <= NARROW else "ieee", **tiling.launch,
        )  # fmt: skip
    return output, lses[0], lses[1]


@triton.jit
def _locate(pages, starts, counts, table, located, BLOCK: tl.constexpr):
    """Where the pages of a list lie: looked up page by page, they would be waited for."""
    pair = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    first, count = tl.load(starts + pair), tl.load(counts + pair)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        page = tl.load(pages + first + place, place < count, 0)
        tl.store(located + first + place, tl.load(table + page).to(tl.int32), place < count)


@triton.jit(do_not_specialize=["start", "tokens", "words", "room", "cache_pages"])
def _tiles(
    query, kv, blocks, means, samples, spreads, table, starts, counts, wholes, pages, located,
    masks, bits, left, order, slopes, kinds, output, lses, owns, scale, start, tokens, words, room,
    cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, MEANS: tl.constexpr, SAMPLED: tl.constexpr, ALIKE: tl.constexpr,
    SAMPLES: tl.constexpr, SUMMED: tl.constexpr, PAGE: tl.constexpr, BIASED: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries of a tile, for one KV head."""
    unit, kv_head = _turn(order, PAGE * PADDED // ROWS, ORDERED)
    number, there, line, tile = rows_at(
        unit, kv_head, tl.num_programs(1), start, tokens, GROUP, PADDED, ROWS, PAGE, 1
    )
    channel, key = tl.arange(0, WIDTH), tl.arange(0, PAGE)
    inside = channel < DIM
    wide = there[:, None] & inside[None]
    mine = tl.load(query + line[:, None] * DIM + channel[None], wide, 0.0)  # [ROWS, WIDTH]
    past = start // PAGE + tile
    kinds += unit * tl.num_programs(1) + kv_head
    if SAMPLED:  # noqa: SIM102  (known when it is compiled)
        if tl.load(kinds) == 0:
            return
    if MEANS:
        variance = score_variance(mine, spreads + kv_head * room, past, scale, SUMMED)
        alike = variance < ALIKE
        if not SAMPLED:
            # The next launch has such programs, so that others need no room for what they have not.
            some = tl.max((alike & there).to(tl.int32), 0)
            tl.store(kinds, some.to(tl.int8))
            if some != 0:
                return
    pair = tile * tl.num_programs(1) + kv_head
    first = tl.load(starts + pair)
    whole, count = tl.load(wholes + pair), tl.load(counts + pair)
    base = kv_head * cache_pages
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    slope = tl.zeros((ROWS,), tl.float32)
    beyond, factor = slope, scale  # the latter brings scores to base 2
    if BIASED:
        slope = load_slopes(slopes, kv_head, tl.arange(0, ROWS) % PADDED, GROUP)
        beyond, _ = page_of_slope(slope, PAGE)
        factor = 1.0  # where distance counts they are already
    for place in range(0, whole):
        page = base + tl.load(located + first + place)
        keys = blocks.load([page * PAGE, 0])  # beyond a head's channels the query is 0
        score = tl.dot(mine, tl.trans(keys), input_precision=PRECISION)
        if BIASED:
            position = (tl.load(pages + first + place) - past) * PAGE + key[None]
            falls = bias_at(slope[:, None], position, number[:, None])
            score = score * scale + falls
        values = blocks.load([page * PAGE, DIM])
        peak, total, sums = add_scaled_scores(score, values, factor, peak, total, sums, PRECISION)
    for place in tl.range(whole, count, num_stages=1):
        page = tl.load(pages + first + place)
        word = tl.load(bits + tl.load(masks + first + place) * PAGE + number)
        seen = ((word[:, None] >> key[None].to(tl.int64)) & 1) != 0  # [ROWS, PAGE]
        stored = (page * PAGE + key < start + tokens)[:, None] & inside[None]
        slot = (base + tl.load(table + page)) * PAGE + key
        data = kv + slot[:, None] * (2 * DIM) + channel[None]
        keys = tl.load(data, stored, 0.0)  # [PAGE, WIDTH]
        values = tl.load(data + DIM, stored, 0.0)
        score = tl.dot(mine, tl.trans(keys), input_precision=PRECISION)
        if BIASED:
            falls = bias_at(slope[:, None], (page - past) * PAGE + key[None], number[:, None])
            score = score * scale + falls
        score = tl.where(seen, score, float("-inf"))
        peak, total, sums = add_scaled_scores(score, values, factor, peak, total, sums, PRECISION)
    peak = peak * factor  # to base 2, as what follows is
    tl.store(owns + line, _lse(peak, total), there)
    if MEANS:
        # What a page's mass exceeds its mean's score by, to base 2; it has 64 keys.
        more = tl.where(alike, 0.0, variance * (0.5 * LOG2E)) + 6.0
        peak, total, sums = add_means(
            mine, means, samples, left + pair * words, kv_head * room, tl.num_programs(1) * room,
            past, number, slope, beyond, more, alike, scale, peak, total, sums,
            DIM, SAMPLED, SAMPLES, BIASED, PAGE, PRECISION,
        )  # fmt: skip
    tl.store(lses + line, _lse(peak, total), there)
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(output + line[:, None] * DIM + channel[None], result.to(mine.dtype), wide)


@triton.jit
def _turn(order, UNITS: tl.constexpr, ORDERED: tl.constexpr):
    """A program's number among those of all tiles, and its KV head: long lists begin first."""
    unit, kv_head = tl.program_id(0), tl.program_id(1)
    if ORDERED:
        number = kv_head * tl.num_programs(0) + unit  # a tile's heads begin one after the other
        unit, kv_head = number // tl.num_programs(1), number % tl.num_programs(1)
        unit = tl.load(order + unit // UNITS) * UNITS + unit % UNITS
    else:  # later tiles have more to read
        unit = tl.num_programs(0) - 1 - unit
    return unit, kv_head


@triton.jit
def _lse(peak, total):
    """A running log-sum-exp as it stands, to base e."""
    return (finite(peak) + tl.log2(total)) / LOG2E
