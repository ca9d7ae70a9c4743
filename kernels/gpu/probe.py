"""A first look at few keys of every page, and at its mean, which the scan builds on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.budget import EACH, PROBE
from kernels.gpu import overlap
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import (
    estimate,
    inlined,
    load_factors,
    load_four,
    load_planes,
    log2,
    multiply,
    signed_sums,
)
from kernels.gpu.launch import PROGRAMS
from kernels.gpu.layout import CHUNK
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

CHUNKS = 8
"""Chunks of a program, at the most."""


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
    chunks = scratch.masses.shape[1]
    each = max(1, min(CHUNKS, layout.lines * chunks // PROGRAMS))
    # As they lie in memory they are multiplied.
    direct = cache.key_mean.itemsize == 2 and layout.head_dim % 32 == 0
    overlaps = overlap.possible(query.device)
    _probe[layout.lines, triton.cdiv(chunks, each)](
        query.view(torch.int32) if direct else query,
        cache.key_mean.view(torch.int32) if direct else cache.key_mean,
        cache.codes.view(torch.int32), cache.scale.view(torch.int64), rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.planes, scratch.factors,
        scratch.centres, scratch.probes, scratch.masses,
        scale, sinks, rows.queries, layout.kv_heads, layout.pages, chunks, each,
        rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, DIM=layout.head_dim,
        WIDTH=triton.next_power_of_2(layout.head_dim), SETS=layout.sets,
        STEPS=layout.steps, WORDS=layout.words, DIRECT=direct,
        BFLOAT=query.dtype == torch.bfloat16, CHUNK=CHUNK, CHUNKS=CHUNKS, PROBE=PROBE, EACH=EACH,
        PAGE=PAGE,
        BIASED=cache.slopes is not None, OVERLAP=overlaps, launch_pdl=overlaps, num_warps=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "sinks", "queries", "kv_heads", "pages", "chunks", "each", "table_stride", "cache_pages"
    ]
)  # fmt: skip
def _probe(
    query, means, codes, scales, tables, starts, lengths, slopes, planes, factors, centres, probes,
    masses, scale, sinks, queries, kv_heads, pages, chunks, each, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SETS: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, DIRECT: tl.constexpr,
    BFLOAT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PROBE: tl.constexpr,
    EACH: tl.constexpr, PAGE: tl.constexpr, BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A part of one line's pages, by one warp: see `kernels.gpu.lanes`.

    While some pages are scored the next are on their way. What is read of the cache is of pages
    that were full before this step, and need not be waited for.
    """
    overlap.begin(OVERLAP)
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    low = tl.maximum(part * each, start // (PAGE * CHUNK)) * CHUNK
    stop = tl.maximum(length // PAGE - 1, 0)
    high = tl.minimum((part + 1) * each * CHUNK, stop)
    masses += line * chunks * PADDED
    # Chunks of which no key is probed.
    mine, padded = tl.arange(0, CHUNKS)[:, None], tl.arange(0, PADDED)[None]
    chunk = part * each + mine
    left = (chunk * CHUNK < low) | (chunk * CHUNK >= high)
    left = left & (mine < each) & (chunk < chunks) & (padded < PADDED)
    if low >= high:
        overlap.wait(OVERLAP)
        tl.store(masses + chunk * PADDED + padded, float("-inf"), left)
        return
    table = tables + (row // queries) * table_stride
    wide: tl.constexpr = DIM // 2 if DIRECT else DIM
    means += kv_head * cache_pages * wide
    codes += kv_head * cache_pages * (WORDS * PAGE)
    scales += kv_head * cache_pages * (PAGE // PROBE)
    centres += line * pages * PADDED
    probes += line * pages * (PADDED * PROBE)
    # Lanes (g, t) have the probed keys of pages g and 8 + g, one product each.
    lane, channel = tl.arange(0, 32), tl.arange(0, WIDTH)
    column, member = lane // 4, lane % 4
    last = tl.maximum(stop - 1, 0)  # behind it it is loaded again: that asks for no mask
    loaded = _load_chunk(
        means, codes, scales, table, low, last, column, member, channel,
        STEPS, WORDS, DIM, DIRECT, CHUNK, PROBE, EACH, PAGE,
    )  # fmt: skip
    overlap.wait(OVERLAP)
    tl.store(masses + chunk * PADDED + padded, float("-inf"), left)
    heads, set_planes, set_factors = (), (), ()
    for some in tl.static_range(SETS):
        # Each head stands in two columns: so its scores lie where its lanes want them.
        if DIRECT:
            twice = tl.minimum(some * 4 + column // 2, GROUP - 1)
            words = ()
            for place in tl.static_range(DIM // 2):
                if place % 16 < 4:
                    part = place + member * 4
                    words += (tl.load(query + (line * GROUP + twice) * wide + part),)  # type: ignore[assignment]
            heads += (words,)  # type: ignore[assignment]
        else:
            twice = some * 4 + tl.arange(0, 8) // 2
            one = tl.load(
                query + (line * GROUP + twice)[None] * DIM + channel[:, None],
                (twice < GROUP)[None] & (channel < DIM)[:, None],
                0.0,
            )  # [WIDTH, 8]
            heads += (one,)  # type: ignore[assignment]
        set_planes += (load_planes(planes + (line * SETS + some) * (STEPS * 2 * 32), lane, STEPS),)  # type: ignore[assignment]
        set_factors += (load_factors(factors, line, member, PADDED, some),)  # type: ignore[assignment]
    for first in range(low, high, CHUNK):
        mean, low_words, high_words, low_size, high_size = loaded
        loaded = _load_chunk(
            means, codes, scales, table, first + CHUNK, last, column, member, channel,
            STEPS, WORDS, DIM, DIRECT, CHUNK, PROBE, EACH, PAGE,
        )  # fmt: skip
        low_sizes, high_sizes = _unpacked(low_size), _unpacked(high_size)
        low_page, high_page = first + column, first + CHUNK // 2 + column
        low_there, high_there = low_page < stop, high_page < stop
        # Positions of the first keys that are probed.
        low_key = low_page * PAGE + low_page * 7 % EACH * PROBE
        high_key = high_page * PAGE + high_page * 7 % EACH * PROBE
        for some in tl.static_range(SETS):
            if DIRECT:
                zero = tl.zeros((32,), tl.float32)
                four = (zero, zero, zero, zero)
                four = multiply(mean[0], mean[1], heads[some], four, BFLOAT)
                low_centre, high_centre = four[0], four[2]
            else:
                centre = tl.dot(mean, heads[some], input_precision="ieee")
                centre, _ = tl.split(tl.reshape(centre, (2, 8, 4, 2)))  # of [CHUNK, 8]
                centre = tl.reshape(tl.permute(centre, (1, 2, 0)), (32, 2))
                low_centre, high_centre = tl.split(centre)
            low_centre, high_centre = low_centre * (scale * LOG2E), high_centre * (scale * LOG2E)
            head = some * 4 + member
            if BIASED:
                slope = load_slopes(slopes, kv_head, head, GROUP)
                low_centre += slope * (low_page * PAGE - (length - 1)).to(tl.float32)
                high_centre += slope * (high_page * PAGE - (length - 1)).to(tl.float32)
            # Heads that are none are of no mass.
            low_centre = tl.where((head < GROUP) & low_there, low_centre, float("-inf"))
            high_centre = tl.where((head < GROUP) & high_there, high_centre, float("-inf"))
            there = head < PADDED
            tl.store(centres + low_page * PADDED + head, low_centre, there & low_there)
            tl.store(centres + high_page * PADDED + head, high_centre, there & high_there)
            low_scores, high_scores = (), ()
            peak = tl.full((32,), float("-inf"), tl.float32)
            for probed in tl.static_range(PROBE):
                lows, highs = (), ()
                for step in tl.static_range(STEPS):
                    lows += (low_words[step * PROBE + probed],)  # type: ignore[assignment]
                    highs += (high_words[step * PROBE + probed],)  # type: ignore[assignment]
                sums = signed_sums(lows, highs, set_planes[some], STEPS)
                score = estimate(sums[0], low_sizes[probed], set_factors[some], low_centre)
                next_score = estimate(sums[1], high_sizes[probed], set_factors[some], high_centre)
                if BIASED:
                    score += slope * (low_key + probed - low_page * PAGE).to(tl.float32)
                    next_score += slope * (high_key + probed - high_page * PAGE).to(tl.float32)
                free = (low_key + probed >= start) & (low_key + probed >= sinks)
                score = tl.where(free, score, float("-inf"))
                free = (high_key + probed >= start) & (high_key + probed >= sinks)
                next_score = tl.where(free, next_score, float("-inf"))
                low_scores += (score,)  # type: ignore[assignment]
                high_scores += (next_score,)  # type: ignore[assignment]
                peak = tl.maximum(peak, tl.maximum(score, next_score))
            _store_scores(probes, low_page, head, low_scores, there & low_there, PADDED, PROBE)
            _store_scores(probes, high_page, head, high_scores, there & high_there, PADDED, PROBE)
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            total = tl.zeros((32,), tl.float32)
            for number in tl.static_range(PROBE):
                total += tl.exp2(low_scores[number] - safe) + tl.exp2(high_scores[number] - safe)
            peak = tl.reshape(peak, (8, 4))
            most = tl.max(peak, 0)
            most = tl.where(most == float("-inf"), 0.0, most)
            total = tl.sum(tl.reshape(total, (8, 4)) * tl.exp2(peak - most[None]), 0)
            head = some * 4 + tl.arange(0, 4)
            target = masses + first // CHUNK * PADDED + head
            tl.store(target, most + log2(total), head < PADDED)


@inlined
def _load_chunk(
    means, codes, scales, table, first, last, column, member, channel,
    STEPS: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, DIRECT: tl.constexpr,
    CHUNK: tl.constexpr, PROBE: tl.constexpr, EACH: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Means of some pages, and codes and scales of the keys probed in them.

    Means are [CHUNK, WIDTH], or words of pages g and 8 + g as `multiply` takes them.
    """
    low, high = first + column, first + CHUNK // 2 + column
    low_cached = tl.load(table + tl.minimum(low, last))
    high_cached = tl.load(table + tl.minimum(high, last))
    low_key, high_key = low * 7 % EACH * PROBE, high * 7 % EACH * PROBE
    low_words = _load_words(
        codes + low_cached * (WORDS * PAGE) + low_key * 2, member, STEPS, WORDS, PAGE
    )
    high_words = _load_words(
        codes + high_cached * (WORDS * PAGE) + high_key * 2, member, STEPS, WORDS, PAGE
    )
    low_size = tl.load(scales + low_cached * (PAGE // PROBE) + low_key // PROBE)
    high_size = tl.load(scales + high_cached * (PAGE // PROBE) + high_key // PROBE)
    if DIRECT:
        mean = (
            _load_mean(means + low_cached * (DIM // 2), member, DIM),
            _load_mean(means + high_cached * (DIM // 2), member, DIM),
        )
    else:
        own = tl.load(table + tl.minimum(first + tl.arange(0, CHUNK), last))
        mean = tl.load(means + own[:, None] * DIM + channel[None], (channel < DIM)[None], 0.0)
    return mean, low_words, high_words, low_size, high_size


@inlined
def _load_mean(means, member, DIM: tl.constexpr):
    """Lane t's part of `DIM` numbers of 16 bits from each of `means` on: int32 [32], two each."""
    words = ()
    for place in tl.static_range(0, DIM // 2, 16):
        words += load_four(means + (place + member * 4), True)
    return words


@inlined
def _load_words(codes, member, STEPS: tl.constexpr, WORDS: tl.constexpr, PAGE: tl.constexpr):
    """Of four neighbouring keys word t of each step: int32 [32] each, step by step.

    Args:
        codes: where the first of the keys has its first word, [32].
        member: t.
    """
    words = ()
    for step in tl.static_range(STEPS):
        there = step * 4 + member < WORDS
        # A word of 64 bits has two of ours, of each key side by side.
        pair = codes + tl.where(there, step * (4 * PAGE) + member // 2 * (2 * PAGE), 0)
        one, two = load_four(pair, True), load_four(pair + 4, True)
        for number in tl.static_range(2):
            word = tl.where(member % 2 == 0, one[2 * number], one[2 * number + 1])
            words += (tl.where(there, word, 0),)  # type: ignore[assignment]
        for number in tl.static_range(2):
            word = tl.where(member % 2 == 0, two[2 * number], two[2 * number + 1])
            words += (tl.where(there, word, 0),)  # type: ignore[assignment]
    return words


@inlined
def _unpacked(sizes):
    """Four bfloat16 of an int64, as float32 each."""
    low, high = sizes.to(tl.int32), (sizes >> 32).to(tl.int32)
    return (
        (low << 16).to(tl.float32, bitcast=True),
        (low & -65536).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True),
        (high & -65536).to(tl.float32, bitcast=True),
    )


@inlined
def _store_scores(probes, page, head, scores, there, PADDED: tl.constexpr, PROBE: tl.constexpr):
    """A page's probed keys side by side, of each head."""
    even, odd = tl.join(scores[0], scores[2]), tl.join(scores[1], scores[3])
    four = tl.reshape(tl.join(even, odd), (32, PROBE))
    place = (page * PADDED + head) * PROBE
    tl.store(probes + place[:, None] + tl.arange(0, PROBE)[None], four, there[:, None])
