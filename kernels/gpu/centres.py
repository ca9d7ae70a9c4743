"""Scores of pages' centres, 16 at once: lane (g, t) has pages g and 8 + g with head t of four.

See `kernels.gpu.lanes` for what g and t are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl

from kernels.gpu import float8
from kernels.gpu.distance import load_slopes
from kernels.gpu.lanes import (
    half_numbers,
    inlined,
    load_four,
    load_two,
    multiply,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache


def centres_of(cache: LayerCache, query: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The centres and the query as `score_centres` takes them, and whether these are words.

    Words are what tensor cores take.
    """
    if float8.known(query.device) and cache.kv.itemsize == 2 and cache.head_dim % 32 == 0:
        return cache.centre.view(torch.int32), query.view(torch.int32), True
    return cache.centre.view(torch.uint8), query, False


@inlined
def score_centres(
    centres, query, low, high, page, heads, lane, scale, slopes, kv_head, newest,
    FIRST: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    DIRECT: tl.constexpr, BFLOAT: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Scores of some pages' centres with four heads of a group, from `FIRST` on, to base 2.

    Args:
        centres: of the KV head's pages; where `DIRECT` in words of four channels, as they lie.
        query: of all heads; where `DIRECT` in words of two channels.
        low: int64 [lanes], where pages g lie.
        high: likewise pages 8 + g.
        page: int32 [lanes], numbers of pages g; 8 more are those of the others.
        heads: the group's first one.
        lane: int32 [lanes], of a warp.
        scale: factor on the scores, to base 2.
        slopes, kv_head, newest: what distance costs, where scores depend on it, and the newest key.

    Returns:
        float32 [lanes] of pages g, and of 8 + g; of heads that are none -inf.
    """
    column, member = lane // 4, lane % 4
    if DIRECT:
        # Each head stands in two columns: so its scores lie where its lanes want them.
        own = heads + tl.minimum(FIRST + column // 2, GROUP - 1)
        zero = tl.zeros(lane.shape, tl.float32)
        four = (zero, zero, zero, zero)
        each: tl.constexpr = 16 if DIM % 64 == 0 else 8  # channels of a lane at once
        for place in tl.static_range(0, DIM, 4 * each):
            channel = place + member * each
            four = multiply(
                _load_numbers(centres + low * (DIM // 4) + channel // 4, each),
                _load_numbers(centres + high * (DIM // 4) + channel // 4, each),
                _load_query(query + own * (DIM // 2) + channel // 2, each, BFLOAT),
                four, False,
            )  # fmt: skip
        low_score, high_score = four[0], four[2]
    else:
        own = heads + tl.minimum(FIRST + member, GROUP - 1)
        low_score, high_score = tl.zeros(lane.shape, tl.float32), tl.zeros(lane.shape, tl.float32)
        for first in range(0, DIM, 16):
            channel = first + tl.arange(0, 16)[None]
            inside = channel < DIM
            mine = tl.load(query + own[:, None] * DIM + channel, inside, 0.0).to(tl.float32)
            low_bytes = tl.load(centres + low[:, None] * DIM + channel, inside, 0)
            high_bytes = tl.load(centres + high[:, None] * DIM + channel, inside, 0)
            low_score += tl.sum(float8.of_byte(low_bytes) * mine, 1)
            high_score += tl.sum(float8.of_byte(high_bytes) * mine, 1)
    low_score, high_score, head = low_score * scale, high_score * scale, FIRST + member
    if BIASED:
        slope, distance = load_slopes(slopes, kv_head, head, GROUP), page * PAGE - newest
        low_score += slope * distance.to(tl.float32)
        high_score += slope * (distance + 8 * PAGE).to(tl.float32)
    there = head < GROUP
    none = float("-inf")
    return tl.where(there, low_score, none), tl.where(there, high_score, none)


@inlined
def _load_numbers(centres, EACH: tl.constexpr):
    """So many channels on end, two float16 a word."""
    packed = load_four(centres, 0) if EACH == 16 else load_two(centres)
    words = ()
    for place in tl.static_range(EACH // 4):
        words += float8.as_halves(packed[place])
    return words


@inlined
def _load_query(query, EACH: tl.constexpr, BFLOAT: tl.constexpr):
    """Likewise of a query's."""
    words = ()
    for place in tl.static_range(0, EACH // 2, 4):
        four = load_four(query, place)
        for number in tl.static_range(4):
            words += (half_numbers(four[number], BFLOAT),)  # type: ignore[assignment]
    return words
