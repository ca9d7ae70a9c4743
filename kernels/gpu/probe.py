"""A first look at the means of all pages, and at a few keys, which the scan builds on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import budget
from kernels.budget import APART, PROBE
from kernels.codes import FOURS
from kernels.gpu import overlap
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import (
    estimate,
    inlined,
    load_factors,
    load_four,
    load_planes,
    load_two,
    load_words,
    log2,
    multiply,
    own_word,
    signed_sums,
    two_sizes,
)
from kernels.gpu.launch import PROGRAMS
from kernels.gpu.layout import BLOCK, CHUNK
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

BLOCKS = 2
"""Blocks of a program, at the most."""


def probe(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    layout: Layout,
    scratch: Scratch,
) -> None:
    """Score the means of all pages and the probed keys.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        scale: factor on the scores.
        layout: the launch's sizes.
        scratch: what is read and written.
    """
    blocks = scratch.masses.shape[1]
    each = max(1, min(BLOCKS, layout.lines * blocks // PROGRAMS))
    # As they lie in memory they are multiplied.
    direct = cache.key_mean.itemsize == 2 and layout.head_dim % 32 == 0
    overlaps = overlap.possible(query.device)
    _probe[layout.lines, triton.cdiv(blocks, each)](
        query.view(torch.int32) if direct else query,
        cache.key_mean.view(torch.int32) if direct else cache.key_mean,
        cache.codes, cache.scale.view(torch.int32), rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.planes, scratch.factors,
        scratch.centres, scratch.probes, scratch.masses,
        scale, sinks, rows.queries, layout.kv_heads, layout.room, blocks, each,
        rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, DIM=layout.head_dim,
        WIDTH=triton.next_power_of_2(layout.head_dim), SETS=layout.sets,
        STEPS=layout.steps, WORDS=layout.words, DIRECT=direct,
        BFLOAT=query.dtype == torch.bfloat16, CHUNK=CHUNK, BLOCK=BLOCK, BLOCKS=BLOCKS,
        APART=APART, FAR=budget.FAR, PROBE=PROBE, FOURS=FOURS, PAGE=PAGE,
        BIASED=cache.slopes is not None, OVERLAP=overlaps, launch_pdl=overlaps, num_warps=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "sinks", "queries", "kv_heads", "room", "blocks", "each", "table_stride", "cache_pages"
    ]
)  # fmt: skip
def _probe(
    query, means, codes, scales, tables, starts, lengths, slopes, planes, factors, centres, probes,
    masses, scale, sinks, queries, kv_heads, room, blocks, each, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SETS: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, DIRECT: tl.constexpr,
    BFLOAT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    APART: tl.constexpr, FAR: tl.constexpr, PROBE: tl.constexpr, FOURS: tl.constexpr,
    PAGE: tl.constexpr, BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A part of one line's pages, by one warp: see `kernels.gpu.lanes`.

    What is read of the cache is of pages that were full before this step. The query, too, was
    complete before the kernel that quantises it let this one begin: only what that one writes has
    to be waited for, and the means are scored by then.
    """
    overlap.begin(OVERLAP)
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    low = tl.maximum(part * each, start // (PAGE * BLOCK)) * BLOCK
    stop = tl.maximum(length // PAGE - 1, 0)
    high = tl.minimum((part + 1) * each * BLOCK, stop)
    masses += line * blocks * PADDED
    # Blocks of which no key is probed.
    mine, padded = tl.arange(0, BLOCKS)[:, None], tl.arange(0, PADDED)[None]
    block = part * each + mine
    left = (block * BLOCK < low) | (block * BLOCK >= high)
    left = left & (mine < each) & (block < blocks) & (padded < PADDED)
    tl.store(masses + block * PADDED + padded, float("-inf"), left)
    if low >= high:
        overlap.wait(OVERLAP)
        return
    table = tables + (row // queries) * table_stride
    wide: tl.constexpr = DIM // 2 if DIRECT else DIM
    means += kv_head * cache_pages * wide
    lane, channel = tl.arange(0, 32), tl.arange(0, WIDTH)
    column, member = lane // 4, lane % 4
    codes += kv_head * cache_pages * (WORDS * PAGE) + own_word(member, WORDS)
    scales += kv_head * cache_pages * (PAGE // 2)
    centres += line * room * PADDED
    probes += line * blocks * (BLOCK * PADDED * PROBE)
    heads = ()
    for some in tl.static_range(SETS):
        # Each head stands in two columns: so its scores lie where its lanes want them.
        if DIRECT:
            twice = tl.minimum(some * 4 + column // 2, GROUP - 1)
            words = ()
            for place in tl.static_range(DIM // 2):
                if place % 16 < 4:
                    own = place + member * 4
                    words += (tl.load(query + (line * GROUP + twice) * wide + own),)  # type: ignore[assignment]
            heads += (words,)  # type: ignore[assignment]
        else:
            twice = some * 4 + tl.arange(0, 8) // 2
            one = tl.load(
                query + (line * GROUP + twice)[None] * DIM + channel[:, None],
                (twice < GROUP)[None] & (channel < DIM)[:, None],
                0.0,
            )  # [WIDTH, 8]
            heads += (one,)  # type: ignore[assignment]
    last = tl.maximum(stop - 1, 0)  # behind it it is loaded again: that asks for no mask
    mean = _load_means(means, table, low, last, column, member, channel, DIM, DIRECT, CHUNK)
    apart = apart_of(length - start, FAR)
    for first in range(low, high, BLOCK):
        # Lane (g, t) has probed pages where it has their means' scores, in its own rows of chunks.
        page = first + column % apart * CHUNK + column
        found = _load_probed(
            codes, scales, table, page, last, member, STEPS, WORDS, CHUNK, PROBE, FOURS, PAGE
        )
        centre = ()
        for turn in tl.static_range(APART):
            before, centre_before, centre = mean, centre, ()
            mean = _load_means(
                means, table, first + (turn + 1) * CHUNK, last, column, member, channel,
                DIM, DIRECT, CHUNK,
            )  # fmt: skip
            page = first + turn * CHUNK + column
            for some in tl.static_range(SETS):
                low_centre, high_centre = _scored(before, heads[some], DIRECT, BFLOAT)
                low_centre, high_centre = (
                    low_centre * (scale * LOG2E),
                    high_centre * (scale * LOG2E),
                )
                head = some * 4 + member
                if BIASED:
                    slope = load_slopes(slopes, kv_head, head, GROUP)
                    distance = page * PAGE - (length - 1)
                    low_centre += slope * distance.to(tl.float32)
                    high_centre += slope * (distance + CHUNK // 2 * PAGE).to(tl.float32)
                # Heads that are none are of no mass.
                low_there, high_there = page < stop, page + CHUNK // 2 < stop
                low_centre = tl.where((head < GROUP) & low_there, low_centre, float("-inf"))
                high_centre = tl.where((head < GROUP) & high_there, high_centre, float("-inf"))
                target, there = centres + page * PADDED + head, head < PADDED
                tl.store(target, low_centre, there & low_there)
                tl.store(target + CHUNK // 2 * PADDED, high_centre, there & high_there)
                if turn == 0:
                    centre += ((low_centre, high_centre),)  # type: ignore[assignment]
                else:  # of all chunks, for now
                    centre += (centre_before[some] + (low_centre, high_centre),)  # type: ignore[assignment]
        overlap.wait(OVERLAP)
        for some in tl.static_range(SETS):
            set_planes = load_planes(planes + (line * SETS + some) * (STEPS * 2 * 32), lane, STEPS)
            set_factors = load_factors(factors, line, member, PADDED, some)
            head = some * 4 + member
            mass = tl.full((4,), float("-inf"), tl.float32)
            for turn in range(APART // apart):
                chunk = turn * apart + column % apart
                low_page = first + chunk * CHUNK + column
                if (turn > 0) | (some > 0):
                    found = _load_probed(
                        codes, scales, table, low_page, last, member,
                        STEPS, WORDS, CHUNK, PROBE, FOURS, PAGE,
                    )  # fmt: skip
                low_words, low_size, high_words, high_size = found
                low_sizes = two_sizes(low_size[0]) + two_sizes(low_size[1])
                high_sizes = two_sizes(high_size[0]) + two_sizes(high_size[1])
                low_centre, high_centre = centre[some][0], centre[some][1]
                for number in tl.static_range(1, APART):
                    low_centre = tl.where(chunk == number, centre[some][2 * number], low_centre)
                    high_centre = tl.where(
                        chunk == number, centre[some][2 * number + 1], high_centre
                    )
                high_page = low_page + CHUNK // 2
                # Places of the first keys that are probed; the others are 8 apart.
                low_key, high_key = low_page * 7 % FOURS, high_page * 7 % FOURS
                low_key, high_key = low_key // 8 * 24 + low_key, high_key // 8 * 24 + high_key
                low_free = tl.maximum(start, sinks) - low_page * PAGE - low_key
                high_free = tl.maximum(start, sinks) - high_page * PAGE - high_key
                low_scores, high_scores = (), ()
                peak = tl.full((32,), float("-inf"), tl.float32)
                for probed in tl.static_range(PROBE):
                    lows, highs = (), ()
                    for step in tl.static_range(STEPS):
                        lows += (low_words[step * PROBE + probed],)  # type: ignore[assignment]
                        highs += (high_words[step * PROBE + probed],)  # type: ignore[assignment]
                    sums = signed_sums(lows, highs, set_planes, STEPS)
                    score = estimate(sums[0], low_sizes[probed], set_factors, low_centre)
                    next_score = estimate(sums[1], high_sizes[probed], set_factors, high_centre)
                    if BIASED:
                        slope = load_slopes(slopes, kv_head, head, GROUP)
                        score += slope * (low_key + 8 * probed).to(tl.float32)
                        next_score += slope * (high_key + 8 * probed).to(tl.float32)
                    free = (low_page < stop) & (8 * probed >= low_free)
                    score = tl.where(free, score, float("-inf"))
                    free = (high_page < stop) & (8 * probed >= high_free)
                    next_score = tl.where(free, next_score, float("-inf"))
                    low_scores += (score,)  # type: ignore[assignment]
                    high_scores += (next_score,)  # type: ignore[assignment]
                    peak = tl.maximum(peak, tl.maximum(score, next_score))
                row_of = first // apart + turn * CHUNK + column
                _store_scores(probes, row_of, head, low_scores, PADDED, PROBE)
                _store_scores(probes, row_of + CHUNK // 2, head, high_scores, PADDED, PROBE)
                safe = tl.where(peak == float("-inf"), 0.0, peak)
                total = tl.zeros((32,), tl.float32)
                for number in tl.static_range(PROBE):
                    total += tl.exp2(low_scores[number] - safe)
                    total += tl.exp2(high_scores[number] - safe)
                mass = _joined(mass, _joined_rows(peak, total))
            head = some * 4 + tl.arange(0, 4)
            tl.store(masses + first // BLOCK * PADDED + head, mass, head < PADDED)


@triton.jit
def apart_of(visible, FAR: tl.constexpr):
    """`kernels.budget.apart`."""
    return tl.where(visible < FAR, 1, tl.where(visible < 2 * FAR, 2, 4))


@inlined
def _load_means(
    means, table, first, last, column, member, channel,
    DIM: tl.constexpr, DIRECT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Means of a chunk: [CHUNK, WIDTH], or words of pages g and 8 + g as `multiply` takes them."""
    if DIRECT:
        low = tl.load(table + tl.minimum(first + column, last))
        high = tl.load(table + tl.minimum(first + CHUNK // 2 + column, last))
        mean = (
            _load_mean(means + low * (DIM // 2), member, DIM),
            _load_mean(means + high * (DIM // 2), member, DIM),
        )
    else:
        own = tl.load(table + tl.minimum(first + tl.arange(0, CHUNK), last))
        mean = tl.load(means + own[:, None] * DIM + channel[None], (channel < DIM)[None], 0.0)
    return mean


@inlined
def _scored(mean, heads, DIRECT: tl.constexpr, BFLOAT: tl.constexpr):
    """Products of pages g and 8 + g with head t: float32 [32] each."""
    if DIRECT:
        zero = tl.zeros((32,), tl.float32)
        four = multiply(mean[0], mean[1], heads, (zero, zero, zero, zero), BFLOAT)
        low, high = four[0], four[2]
    else:
        product = tl.dot(mean, heads, input_precision="ieee")
        product, _ = tl.split(tl.reshape(product, (2, 8, 4, 2)))  # of [CHUNK, 8]
        low, high = tl.split(tl.reshape(tl.permute(product, (1, 2, 0)), (32, 2)))
    return low, high


@inlined
def _load_probed(
    codes, scales, table, page, last, member,
    STEPS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, PROBE: tl.constexpr,
    FOURS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the keys probed in `page` [32], and of those half a chunk behind."""
    found = ()
    for half in tl.static_range(2):
        own = page + half * (CHUNK // 2)
        cached, four = tl.load(table + tl.minimum(own, last)), own * 7 % FOURS
        start = codes + cached * (WORDS * PAGE) + four * (WORDS * PROBE)
        words = load_words(start, member, STEPS, WORDS)
        found += (words, load_two(scales + cached * (PAGE // 2) + four * 2))  # type: ignore[assignment]
    return found


@inlined
def _joined_rows(peak, total):
    """Log of the mass of a column's lanes, of which each has `total` times 2 ** `peak`: [4]."""
    peak = tl.reshape(peak, (8, 4))
    most = tl.max(peak, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.reshape(total, (8, 4)) * tl.exp2(peak - most[None]), 0)
    return most + log2(total)


@inlined
def _joined(one, other):
    """Log of the sum of two masses."""
    peak = tl.maximum(one, other)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + log2(tl.exp2(one - peak) + tl.exp2(other - peak))


@inlined
def _load_mean(means, member, DIM: tl.constexpr):
    """Lane t's part of `DIM` numbers of 16 bits from each of `means` on: int32 [32], two each."""
    words = ()
    for place in tl.static_range(0, DIM // 2, 16):
        words += load_four(means + (place + member * 4), True)
    return words


@inlined
def _store_scores(probes, page, head, scores, PADDED: tl.constexpr, PROBE: tl.constexpr):
    """A page's probed keys side by side, of each head; `page` counts the probed ones."""
    even, odd = tl.join(scores[0], scores[2]), tl.join(scores[1], scores[3])
    four = tl.reshape(tl.join(even, odd), (32, PROBE))
    place = (page * PADDED + head) * PROBE
    tl.store(probes + place[:, None] + tl.arange(0, PROBE)[None], four, (head < PADDED)[:, None])
