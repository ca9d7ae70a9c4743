"""Attention of a prompt's tokens over the pages that their tiles read, and the others' means.

One program has 128 rows, a tile's queries by the heads of a group, and goes through the tile's list
(FlashAttention; Dao 2023, "FlashAttention-2"). Pages seen whole come in by the GPU's copy engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu.distance import load_slopes, page_of_slope, slopes_of
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE
from kernels.tiles import ALIKE, SAMPLES, TURN

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tiles import TileSelection

ROWS = 128
"""Queries times heads of a program; half as many where a head is wide."""
GATHERED = 16
"""Pages whose means a program brings together."""
SUMMED = 1024
"""Pages whose spreads a program adds up at once."""
WIDE = 128
"""Channels beyond which it is."""
NARROW = 64
"""Channels up to which products of float32 are three of TF32, as exact and on the tensor cores.

What that keeps of wider heads' keys does not fit into shared memory.
"""


def rows_of(group: int, head_dim: int, every: int) -> tuple[int, int]:
    """How many rows a program has of every so many queries, and how many are of one query."""
    padded = int(triton.next_power_of_2(group))
    return min(ROWS if head_dim <= WIDE else ROWS // 2, PAGE // every * padded), padded


@dataclass(frozen=True, slots=True)
class Summaries:
    """What stands for a sequence's pages, laid out like pages of keys and values."""

    means: TensorDescriptor  # [kv_heads * room, 2 * head_dim]  of a page's keys and values, by 64
    samples: TensorDescriptor  # [SAMPLES * kv_heads * room, 2 * head_dim]  keys of theirs, values
    spreads: Tensor  # float32 [kv_heads, room]
    room: int  # pages, a multiple of 64

    @staticmethod
    def of(cache: LayerCache, segment: Segment, together: int = PAGE) -> Summaries:
        """Those of all pages but the last tile's own, and zeros behind them.

        Args:
            cache: the layer's paged cache.
            segment: where the tiles stand.
            together: pages that are read at once, 64 or a multiple.
        """
        kv_heads, head_dim = cache.kv_heads, cache.head_dim
        pages, width = len(segment.block_table) - 1, triton.next_power_of_2(head_dim)
        room = max(1, -(-pages // together)) * together
        means = cache.key_mean.new_empty(1 + SAMPLES, kv_heads * room, 2 * head_dim)
        spreads = cache.spread.new_empty(kv_heads, room)
        _gather[room // GATHERED, kv_heads](
            cache.key_mean, cache.value_mean, cache.spread, cache.kv, segment.block_table,
            means[0], means[1:], spreads, pages, room, cache.kv.shape[1],
            DIM=head_dim, WIDTH=width, GATHERED=GATHERED, TURN=TURN, SAMPLES=SAMPLES, PAGE=PAGE,
            num_warps=4,
        )  # fmt: skip
        parts = means[0], means[1:].flatten(0, 1)
        mean, sample = (TensorDescriptor.from_tensor(part, [together, width]) for part in parts)
        return Summaries(mean, sample, spreads, room)


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.prefill.tile_attention`."""
    tokens, heads, head_dim = query.shape
    kv_heads, group, device = cache.kv_heads, heads // cache.kv_heads, query.device
    width = triton.next_power_of_2(head_dim)
    rows, padded = rows_of(group, head_dim, 1)
    tiles = selection.counts.shape[0]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lses = torch.empty(2, tokens, heads, device=device)
    left = selection.left
    blocks = TensorDescriptor.from_tensor(cache.kv.view(-1, 2 * head_dim), [PAGE, width])
    # Where no means stand for pages, none are read.
    summaries = Summaries(blocks, blocks, lses, 0) if left is None else Summaries.of(cache, segment)
    small = rows == ROWS and query.itemsize == 2  # two programs then share a multiprocessor
    kinds = torch.empty(tiles * (PAGE * padded // rows), kv_heads, dtype=torch.int8, device=device)
    starts, counts = selection.starts.contiguous(), selection.counts.contiguous()
    located = torch.empty_like(selection.pages)
    _locate[tiles, kv_heads](
        selection.pages, starts, counts, segment.block_table, located, BLOCK=SUMMED, num_warps=4
    )
    for sampled in (False,) if left is None else (False, True):
        _tiles[tiles * (PAGE * padded // rows), kv_heads](
            query.contiguous(), cache.kv, blocks, summaries.means, summaries.samples,
            summaries.spreads, segment.block_table,
            starts, counts, selection.whole.contiguous(), selection.pages, located,
            selection.masks, selection.bits,
            selection.bits if left is None else left.contiguous(),
            counts if selection.order is None else selection.order,
            slopes_of(cache), kinds, output, lses[0], lses[1],
            scale * LOG2E.value, segment.start, tokens,
            0 if left is None else left.shape[2], summaries.room, cache.kv.shape[1],
            GROUP=group, PADDED=padded, ROWS=rows, DIM=head_dim, WIDTH=width,
            MEANS=left is not None, SAMPLED=sampled, ALIKE=ALIKE, SAMPLES=SAMPLES, SUMMED=SUMMED,
            PAGE=PAGE, BIASED=cache.slopes is not None, ORDERED=selection.order is not None,
            PRECISION="tf32x3" if width <= NARROW else "ieee",
            num_warps=rows // 16, num_stages=2, maxnreg=128 if small else None,
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
    unit, kv_head = tl.program_id(0), tl.program_id(1)
    if ORDERED:
        units: tl.constexpr = PAGE * PADDED // ROWS
        number = kv_head * tl.num_programs(0) + unit  # a tile's heads begin one after the other
        unit, kv_head = number // tl.num_programs(1), number % tl.num_programs(1)
        unit = tl.load(order + unit // units) * units + unit % units
    else:  # later tiles have more to read: they begin first
        unit = tl.num_programs(0) - 1 - unit
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
        variance = score_variance(mine, mean_spread(spreads + kv_head * room, past, SUMMED), scale)
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
    factor = scale  # brings scores to base 2
    if BIASED:
        slope = load_slopes(slopes, kv_head, tl.arange(0, ROWS) % PADDED, GROUP)
        beyond, _ = page_of_slope(slope, PAGE)
        factor = 1.0  # where distance counts they are already
    for place in range(0, whole):
        page = base + tl.load(located + first + place)
        keys = blocks.load([page * PAGE, 0])  # beyond a head's channels the query is 0
        score = tl.dot(mine, tl.trans(keys), input_precision=PRECISION)
        if BIASED:
            listed = tl.load(pages + first + place)
            distance = ((listed - past) * PAGE + key[None] - number[:, None]).to(tl.float32)
            score = score * scale + slope[:, None] * distance
        values = blocks.load([page * PAGE, DIM])
        peak, total, sums = _add(score, values, factor, peak, total, sums, PRECISION)
    for place in tl.range(whole, count, num_stages=1):
        page = tl.load(pages + first + place)
        word = tl.load(bits + tl.load(masks + first + place) * PAGE + number)
        seen = ((word[:, None] >> key[None].to(tl.int64)) & 1) != 0  # [ROWS, PAGE]
        stored = (page * PAGE + key < start + tokens)[:, None] & inside[None]
        listed = page
        page = base + tl.load(table + page)
        data = kv + (page * PAGE + key)[:, None] * (2 * DIM) + channel[None]
        keys = tl.load(data, stored, 0.0)  # [PAGE, WIDTH]
        values = tl.load(data + DIM, stored, 0.0)
        score = tl.dot(mine, tl.trans(keys), input_precision=PRECISION)
        if BIASED:
            distance = ((listed - past) * PAGE + key[None] - number[:, None]).to(tl.float32)
            score = score * scale + slope[:, None] * distance
        score = tl.where(seen, score, float("-inf"))
        peak, total, sums = _add(score, values, factor, peak, total, sums, PRECISION)
    peak = peak * factor  # to base 2, as what follows is
    tl.store(owns + line, _lse(peak, total), there)
    if MEANS:
        # What a page's mass exceeds its mean's score by, to base 2; it has 64 keys.
        more = tl.where(alike, 0.0, variance * (0.5 * 1.4426950408889634)) + 6.0
        # Two stages of keys besides would leave no room for a second program.
        for block in tl.range(0, past, PAGE, num_stages=1 if SAMPLED else 2):
            word = tl.load(left + pair * words + block // PAGE)
            stands = ((word >> key.to(tl.int64)) & 1) != 0
            keys = means.load([kv_head * room + block, 0])
            score = tl.dot(mine, tl.trans(keys), input_precision=PRECISION) * scale + more[:, None]
            excess = 6.0  # of a page's 64 keys
            if BIASED:
                distance = ((block + key - past)[None] * PAGE - number[:, None]).to(tl.float32)
                falls = slope[:, None] * distance + beyond[:, None]
                score, excess = score + falls, falls + 6.0
            score = tl.where(stands[None], score, float("-inf"))
            if SAMPLED:
                peak, total, sums = _add_with_samples(
                    mine, score, means, samples, kv_head * room + block,
                    tl.num_programs(1) * room, stands, alike, scale, excess, peak, total,
                    sums, DIM, SAMPLES, PRECISION,
                )  # fmt: skip
            else:
                values = means.load([kv_head * room + block, DIM])
                peak, total, sums = _add(score, values, 1.0, peak, total, sums, PRECISION)
    tl.store(lses + line, _lse(peak, total), there)
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(output + line[:, None] * DIM + channel[None], result.to(mine.dtype), wide)


@triton.jit(do_not_specialize=["pages", "room", "cache_pages"])
def _gather(
    key_means, value_means, cached, kv, table, means, samples, spreads, pages, room, cache_pages,
    DIM: tl.constexpr, WIDTH: tl.constexpr, GATHERED: tl.constexpr, TURN: tl.constexpr,
    SAMPLES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The summaries of some pages, from where they lie to where they follow each other."""
    page, kv_head = tl.program_id(0) * GATHERED + tl.arange(0, GATHERED), tl.program_id(1)
    channel, there = tl.arange(0, WIDTH), page < pages
    at = (kv_head * cache_pages + tl.load(table + page, there, 0)).to(tl.int64)
    to, inside = (kv_head * room + page).to(tl.int64), (channel < DIM)[None]
    target = to[:, None] * (2 * DIM) + channel[None]
    source = at[:, None] * DIM + channel[None]
    some = there[:, None] & inside
    tl.store(means + target, tl.load(key_means + source, some, 0.0), inside)
    tl.store(means + target + DIM, tl.load(value_means + source, some, 0.0), inside)
    for sample in tl.static_range(SAMPLES):
        key = at * PAGE + (page * TURN + sample * (PAGE // SAMPLES)) % PAGE
        own = kv + key[:, None] * (2 * DIM) + channel[None]
        tl.store(samples + target, tl.load(own, some, 0.0), inside)
        tl.store(samples + target + DIM, tl.load(own + DIM, some, 0.0), inside)
        samples += (tl.num_programs(1) * room).to(tl.int64) * (2 * DIM)
    tl.store(spreads + to, tl.load(cached + at, there, 0.0))


@triton.jit
def mean_spread(spreads, pages, SUMMED: tl.constexpr):
    """Mean over the first `pages`, 0 where there are none."""
    total = tl.zeros((SUMMED,), tl.float32)
    for block in range(0, pages, SUMMED):
        page = block + tl.arange(0, SUMMED)
        total += tl.load(spreads + page, page < pages, 0.0)
    return tl.sum(total, 0) / tl.maximum(pages, 1)


@triton.jit
def rows_at(
    unit, kv_head, kv_heads, start, tokens,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """Of a program's rows: numbers in the tile, which are there, places; and the tile's number.

    Of `EVERY` queries on end the last one has rows.
    """
    units: tl.constexpr = PAGE // EVERY * PADDED // ROWS
    row, tile = tl.arange(0, ROWS), unit // units
    number = (unit % units * (ROWS // PADDED) + row // PADDED) * EVERY + (EVERY - 1)
    token = start // PAGE * PAGE + tile * PAGE + number - start
    there = (token >= 0) & (token < tokens) & (row % PADDED < GROUP)
    line = (token * kv_heads + kv_head).to(tl.int64) * GROUP + row % PADDED
    return number, there, line, tile


@triton.jit
def score_variance(mine, spread, scale):
    """Of rows' scores on a page's keys, to base e, where `scale` is to base 2: [ROWS]."""
    wide, plain = mine.to(tl.float32), scale / 1.4426950408889634
    return tl.sum(wide * wide, 1) * (plain * plain * spread)


@triton.jit
def _add(score, values, scale, peak, total, sums, PRECISION: tl.constexpr):
    """Some more scores and values into a running softmax; `scale` brings scores to base 2."""
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2((peak - safe) * scale)
    if values.dtype == tl.float32:
        mass = tl.exp2((score - safe[:, None]) * scale)  # the more exact
    else:
        mass = tl.exp2(score * scale - (safe * scale)[:, None])  # one instruction less
    total = total * shrink + tl.sum(mass, 1)
    sums = tl.dot(mass.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    return higher, total, sums


@triton.jit
def _add_with_samples(
    mine, score, means, samples, place, apart, stands, alike, scale, excess, peak, total, sums,
    DIM: tl.constexpr, SAMPLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with means, by their scores, and some keys of each page for rows that are alike.

    Such a row counts the keys alone, and weighs the means' values less the keys', too.
    """
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - safe)
    of_means = tl.exp2(score - safe[:, None])
    total = total * shrink + tl.sum(tl.where(alike[:, None], 0.0, of_means), 1)
    values = means.load([place, DIM])
    sums = tl.dot(
        of_means.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION
    )
    of_means = tl.where(alike[:, None], of_means / SAMPLES, 0.0)
    for sample in tl.static_range(SAMPLES):
        keys = samples.load([place + sample * apart, 0])
        one = tl.dot(mine, tl.trans(keys), input_precision=PRECISION) * scale + excess
        one = tl.where(stands[None] & alike[:, None], one, float("-inf"))
        # One key may be far above its page's mean: float16 ends eleven nats above the peak.
        peak, higher = higher, tl.maximum(higher, tl.max(one, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - safe)
        one = tl.exp2(one - safe[:, None]) / SAMPLES
        total = total * shrink + tl.sum(one, 1)
        of_means *= shrink[:, None]
        values = samples.load([place + sample * apart, DIM])
        less = (one - of_means).to(values.dtype)
        sums = tl.dot(less, values, sums * shrink[:, None], input_precision=PRECISION)
    return higher, total, sums


@triton.jit
def _lse(peak, total):
    """A running log-sum-exp as it stands, to base e."""
    return (tl.where(peak == float("-inf"), 0.0, peak) + tl.log2(total)) / 1.4426950408889634
