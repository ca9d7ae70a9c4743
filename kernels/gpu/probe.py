"""A first look at a few keys, which the scan builds on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import budget
from kernels.budget import PROBE
from kernels.codes import FOURS
from kernels.gpu import float8, overlap
from kernels.gpu.centres import centres_of, score_centres
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import (
    estimate,
    inlined,
    load_factors,
    load_planes,
    load_words,
    log2,
    own_word,
    signed_sums,
)
from kernels.gpu.launch import mostly_cache
from kernels.gpu.layout import CHUNK, ROOM
from kernels.gpu.prepare import LOG2E
from kernels.gpu.softmax import finite
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

REGISTERS = 64
"""Of a thread, at the most: so `layout.ROOM` programs begin at once."""


def probe(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    layout: Layout,
    scratch: Scratch,
) -> None:
    """Score the probed keys.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        scale: factor on the scores.
        layout: the launch's sizes.
        scratch: what is read and written.
    """
    centres, asked, direct = centres_of(cache, query)
    overlaps = overlap.possible(query.device)
    chunks = scratch.masses.shape[1]
    programs = -(-chunks // -(-layout.lines * chunks // ROOM))
    kernel = _probe[layout.lines, programs](
        asked, centres, cache.codes, cache.scale.view(torch.int32), rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.planes, scratch.factors,
        scratch.probes, scratch.masses,
        scale * LOG2E.value, sinks, rows.queries, layout.kv_heads, chunks,
        rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, DIM=layout.head_dim,
        SETS=layout.sets, STEPS=layout.steps, WORDS=layout.words, DIRECT=direct,
        BFLOAT=query.dtype == torch.bfloat16, CHUNK=CHUNK, FAR=budget.FAR, PROBE=PROBE,
        FOURS=FOURS, PAGE=PAGE, BIASED=cache.slopes is not None, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=1, maxnreg=REGISTERS,
    )  # fmt: skip
    mostly_cache(kernel)


@triton.jit(
    do_not_specialize=["sinks", "queries", "kv_heads", "chunks", "table_stride", "cache_pages"]
)
def _probe(
    query, centres, codes, scales, tables, starts, lengths, slopes, planes, factors, probes,
    masses, scale, sinks, queries, kv_heads, chunks, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, SETS: tl.constexpr,
    STEPS: tl.constexpr, WORDS: tl.constexpr, DIRECT: tl.constexpr, BFLOAT: tl.constexpr,
    CHUNK: tl.constexpr, FAR: tl.constexpr, PROBE: tl.constexpr, FOURS: tl.constexpr,
    PAGE: tl.constexpr, BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some of one line's probed pages, by one warp: see `kernels.gpu.lanes`.

    It takes 16 at a time, of as many chunks of pages as one page is probed of: lane (g, t) has
    pages g and 8 + g of 16, of which each is of the next chunk.

    What is read of the cache is of pages that were full before this step. The query, too, was
    complete before the kernel that quantises it let this one begin: only what that one writes has
    to be waited for, and the centres are scored by then.
    """
    overlap.begin(OVERLAP)
    line = tl.program_id(0).to(tl.int64)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    stop, apart = tl.maximum(length // PAGE - 1, 0), apart_of(length - start, FAR)
    every = apart * CHUNK  # pages of which a chunk is probed
    begin = start // (every * PAGE)
    masses += line * chunks * PADDED
    probes += line * chunks * (CHUNK * PADDED * PROBE)
    table = tables + (row // queries) * table_stride
    centres += kv_head * cache_pages * (DIM // 4 if DIRECT else DIM)
    lane = tl.arange(0, 32)
    column, member = lane // 4, lane % 4
    codes += kv_head * cache_pages * (WORDS * PAGE) + own_word(member, WORDS)
    scales += kv_head * cache_pages * (PAGE // 4)
    last = tl.maximum(stop - 1, 0)  # behind it it is loaded again: that asks for no mask
    there = tl.cdiv(stop, every) - begin
    for chunk in range(tl.program_id(1), there, tl.num_programs(1)):
        low_page = (begin + chunk) * every + column % apart * CHUNK + column
        high_page = low_page + CHUNK // 2
        low_place = tl.load(table + tl.minimum(low_page, last)).to(tl.int64)
        high_place = tl.load(table + tl.minimum(high_page, last)).to(tl.int64)
        low_four, high_four = low_page * 7 % FOURS, high_page * 7 % FOURS
        low_words, low_size = _load_probed(
            codes, scales, low_place, low_four, member, STEPS, WORDS, PROBE, PAGE
        )
        high_words, high_size = _load_probed(
            codes, scales, high_place, high_four, member, STEPS, WORDS, PROBE, PAGE
        )
        middles = ()
        for some in tl.static_range(SETS):
            pair = score_centres(
                centres, query, low_place, high_place, low_page, line * GROUP, lane,
                scale, slopes, kv_head, length - 1,
                some * 4, GROUP, DIM, PAGE, DIRECT, BFLOAT, BIASED,
            )  # fmt: skip
            middles += (pair,)  # type: ignore[assignment]
        low_sizes, high_sizes = float8.of_word(low_size, DIRECT), float8.of_word(high_size, DIRECT)
        # Places of the first keys that are probed; the others are 8 apart.
        low_key, high_key = low_four // 8 * 24 + low_four, high_four // 8 * 24 + high_four
        low_free = tl.maximum(start, sinks) - low_page * PAGE - low_key
        high_free = tl.maximum(start, sinks) - high_page * PAGE - high_key
        overlap.wait(OVERLAP)
        for some in tl.static_range(SETS):
            set_planes = planes + (line * SETS + some) * (STEPS * 2 * 32)
            set_planes = load_planes(set_planes, lane, STEPS)
            set_factors = load_factors(factors, line, member, PADDED, some)
            head = some * 4 + member
            low_centre, high_centre = middles[some]  # type: ignore[var-annotated]
            low_scores, high_scores = (), ()
            peak = tl.full((32,), float("-inf"), tl.float32)
            for probed in tl.static_range(PROBE):
                lows, highs = (), ()
                for step in tl.static_range(STEPS):
                    lows += (low_words[step * PROBE + probed],)  # type: ignore[assignment]
                    highs += (high_words[step * PROBE + probed],)  # type: ignore[assignment]
                counts = signed_sums(lows, highs, set_planes, STEPS)
                score = estimate(counts[0], low_sizes[probed], set_factors, low_centre)
                next_score = estimate(counts[1], high_sizes[probed], set_factors, high_centre)
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
            row_of = chunk * CHUNK + column
            _store_scores(probes, row_of, head, low_scores, PADDED, PROBE)
            _store_scores(probes, row_of + CHUNK // 2, head, high_scores, PADDED, PROBE)
            safe = finite(peak)
            total = tl.zeros((32,), tl.float32)
            for number in tl.static_range(PROBE):
                total += tl.exp2(low_scores[number] - safe)
                total += tl.exp2(high_scores[number] - safe)
            own = some * 4 + tl.arange(0, 4)
            tl.store(masses + chunk * PADDED + own, _joined_rows(peak, total), own < PADDED)
    overlap.wait(OVERLAP)  # also where there is nothing to do


@triton.jit
def apart_of(visible, FAR: tl.constexpr):
    """`kernels.budget.apart`."""
    return tl.where(visible < FAR, 1, tl.where(visible < 2 * FAR, 2, 4))


@inlined
def _load_probed(
    codes, scales, place, four, member,
    STEPS: tl.constexpr, WORDS: tl.constexpr, PROBE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of pages' keys that are probed, one of their fours: [32] each."""
    words = load_words(
        codes + place * (WORDS * PAGE) + four * (WORDS * PROBE), member, 0, STEPS, WORDS
    )
    return words, tl.load(scales + place * (PAGE // 4) + four)


@inlined
def _joined_rows(peak, total):
    """Log of the mass of a column's lanes, of which each has `total` times 2 ** `peak`: [4]."""
    peak = tl.reshape(peak, (8, 4))
    most = finite(tl.max(peak, 0))
    total = tl.sum(tl.reshape(total, (8, 4)) * tl.exp2(peak - most[None]), 0)
    return most + log2(total)


@inlined
def _store_scores(probes, page, head, scores, PADDED: tl.constexpr, PROBE: tl.constexpr):
    """A page's probed keys side by side, of each head; `page` counts the probed ones."""
    even, odd = tl.join(scores[0], scores[2]), tl.join(scores[1], scores[3])
    four = tl.reshape(tl.join(even, odd), (32, PROBE))
    place = (page * PADDED + head) * PROBE
    tl.store(probes + place[:, None] + tl.arange(0, PROBE)[None], four, (head < PADDED)[:, None])
