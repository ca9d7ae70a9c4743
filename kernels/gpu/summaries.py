"""What stands for a sequence's pages: gathered side by side, and attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu.distance import bias_at
from kernels.gpu.prepare import LOG2E
from kernels.gpu.softmax import add_scaled_scores, raised
from kernels.page import PAGE
from kernels.tiles import SAMPLES, TURN

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment

GATHERED = 16
"""Pages whose means a program brings together."""
SUMMED = 1024
"""Pages whose spreads a program adds up at once."""


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
def score_variance(mine, spreads, pages, scale, SUMMED: tl.constexpr):
    """Of rows' scores on a page's keys, to base e, where `scale` is to base 2: [ROWS].

    By the mean spread of the first `pages`, 0 where there are none.
    """
    total = tl.zeros((SUMMED,), tl.float32)
    for block in range(0, pages, SUMMED):
        page = block + tl.arange(0, SUMMED)
        total += tl.load(spreads + page, page < pages, 0.0)
    spread = tl.sum(total, 0) / tl.maximum(pages, 1)
    wide, plain = mine.to(tl.float32), scale / LOG2E
    return tl.sum(wide * wide, 1) * (plain * plain * spread)


@triton.jit
def add_means(
    mine, means, samples, left, first, apart, past, number, slope, beyond, more, alike, scale,
    peak, total, sums,
    DIM: tl.constexpr, SAMPLED: tl.constexpr, SAMPLES: tl.constexpr, BIASED: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What stands for the pages `left` before `past`, into a running softmax to base 2."""
    page = tl.arange(0, PAGE)
    # Two stages of keys besides would leave no room for a second program.
    for block in tl.range(0, past, PAGE, num_stages=1 if SAMPLED else 2):
        word = tl.load(left + block // PAGE)
        stands = ((word >> page.to(tl.int64)) & 1) != 0
        keys = means.load([first + block, 0])
        score = tl.dot(mine, tl.trans(keys), input_precision=PRECISION) * scale + more[:, None]
        excess = 6.0  # of a page's 64 keys
        if BIASED:
            begins = (block + page - past)[None] * PAGE
            falls = bias_at(slope[:, None], begins, number[:, None]) + beyond[:, None]
            score, excess = score + falls, falls + 6.0
        score = tl.where(stands[None], score, float("-inf"))
        if SAMPLED:
            peak, total, sums = _add_with_samples(
                mine, score, means, samples, first + block, apart, stands, alike, scale, excess,
                peak, total, sums, DIM, SAMPLES, PRECISION,
            )  # fmt: skip
        else:
            values = means.load([first + block, DIM])
            peak, total, sums = add_scaled_scores(score, values, 1.0, peak, total, sums, PRECISION)
    return peak, total, sums


@triton.jit
def _add_with_samples(
    mine, score, means, samples, place, apart, stands, alike, scale, excess, peak, total, sums,
    DIM: tl.constexpr, SAMPLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some more means, by their scores, and some keys of each page for rows that are alike.

    Such a row counts the keys alone, and weighs the means' values less the keys', too.
    """
    higher, safe = raised(score, peak)
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
        peak = higher
        higher, safe = raised(one, peak)
        shrink = tl.exp2(peak - safe)
        one = tl.exp2(one - safe[:, None]) / SAMPLES
        total = total * shrink + tl.sum(one, 1)
        of_means *= shrink[:, None]
        values = samples.load([place + sample * apart, DIM])
        less = (one - of_means).to(values.dtype)
        sums = tl.dot(less, values, sums * shrink[:, None], input_precision=PRECISION)
    return higher, total, sums
