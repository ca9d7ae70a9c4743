"""A first look at few keys: about how much mass there is, and how many keys to read.

Also scores every page's mean, which the scan builds on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.budget import EACH, PROBE
from kernels.gpu import overlap
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import estimate, load_factors, load_planes, signed_sums
from kernels.gpu.layout import HELD
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

CHUNK = 16
"""Pages that a program takes."""
BLOCK = 2048
"""Probed keys whose shares are added up at once."""


def probe(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    limits: Tensor,
    layout: Layout,
    scratch: Scratch,
    fewest: int,
) -> None:
    """Score the means of all pages and the probed keys, and settle each line's norm and marks.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        scale: factor on the scores.
        limits: float32 [rows or 1, 4], coverage, worth, fewest and most keys.
        layout: the launch's sizes.
        scratch: what is read and written.
        fewest: marks that a line gets at the least.
    """
    parts = -(-layout.pages // CHUNK)
    masses = torch.empty(layout.lines, parts, layout.padded, device=query.device)
    overlaps = overlap.possible(query.device)
    _probe[layout.lines, parts](
        query, cache.key_mean, cache.codes.view(torch.int32), cache.scale, rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.planes, scratch.factors,
        scratch.centres, scratch.probes, masses,
        scale, sinks, rows.queries, layout.kv_heads, layout.pages, rows.block_tables.stride(0),
        cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, HEADS=max(8, layout.padded),
        DIM=layout.head_dim, WIDTH=triton.next_power_of_2(layout.head_dim), SETS=layout.sets,
        STEPS=layout.steps, WORDS=layout.words, CHUNK=CHUNK, PROBE=PROBE, EACH=EACH, PAGE=PAGE,
        BIASED=cache.slopes is not None, OVERLAP=overlaps, launch_pdl=overlaps, num_warps=1,
    )  # fmt: skip
    shares = torch.empty(layout.lines, layout.pages * PROBE, device=query.device)
    _settle[(layout.lines,)](
        masses, scratch.held, scratch.probes, rows.starts, rows.lengths, limits, shares,
        scratch.norm, scratch.marks,
        sinks, parts, layout.kv_heads, layout.pages, 4 if limits.shape[0] > 1 else 0,
        GROUP=layout.group, PADDED=layout.padded, PARTS=triton.next_power_of_2(parts),
        HELD=HELD, BLOCK=BLOCK, PROBE=PROBE, EACH=EACH, SAMPLE=fewest, PAGE=PAGE,
        OVERLAP=overlaps, launch_pdl=overlaps, num_warps=4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["sinks", "queries", "kv_heads", "pages", "table_stride", "cache_pages"]
)
def _probe(
    query, means, codes, scales, tables, starts, lengths, slopes, planes, factors, centres, probes,
    masses, scale, sinks, queries, kv_heads, pages, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, SETS: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr,
    CHUNK: tl.constexpr, PROBE: tl.constexpr, EACH: tl.constexpr, PAGE: tl.constexpr,
    BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A part of one line's pages, by one warp: see `kernels.gpu.lanes`.

    What it reads of the cache is of pages that were full before this step, and need not be waited
    for.
    """
    overlap.begin(OVERLAP)
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, stop = tl.load(starts + row), tl.maximum(tl.load(lengths + row) // PAGE - 1, 0)
    first = part * CHUNK
    masses += (line * tl.num_programs(1) + part) * PADDED
    if (first >= stop) | ((first + CHUNK) * PAGE <= start):
        overlap.wait(OVERLAP)
        padded = tl.arange(0, PADDED)
        tl.store(masses + padded, tl.full((PADDED,), float("-inf"), tl.float32))
        return
    table, base = tables + (row // queries) * table_stride, kv_head * cache_pages
    own, channel, heads = first + tl.arange(0, CHUNK), tl.arange(0, WIDTH), tl.arange(0, HEADS)
    cached = base + tl.load(table + own, own < stop, 0)
    mean = tl.load(
        means + cached[:, None] * DIM + channel[None],
        (own < stop)[:, None] & (channel < DIM)[None],
        0.0,
    )  # [CHUNK, WIDTH]
    # Lanes (g, t) have the probed keys of pages g and 8 + g, one product each.
    lane = tl.arange(0, 32)
    column, member = lane // 4, lane % 4
    low, high = first + column, first + CHUNK // 2 + column
    low_cached = base + tl.load(table + low, low < stop, 0)
    high_cached = base + tl.load(table + high, high < stop, 0)
    low_key, high_key = low * 7 % EACH * PROBE, high * 7 % EACH * PROBE
    low_words, high_words, low_sizes, high_sizes = (), (), (), ()
    inner = codes + member // 2 * (2 * PAGE) + member % 2
    for probed in tl.static_range(PROBE):
        for step in tl.static_range(STEPS):
            there, word = step * 4 + member < WORDS, inner + (step * 4 * PAGE + probed * 2)
            low_words += (tl.load(word + low_cached * (WORDS * PAGE) + low_key * 2, there, 0),)  # type: ignore[assignment]
            high_words += (tl.load(word + high_cached * (WORDS * PAGE) + high_key * 2, there, 0),)  # type: ignore[assignment]
        size = tl.load(scales + low_cached * PAGE + low_key + probed)
        low_sizes += (size.to(tl.float32),)  # type: ignore[assignment]
        size = tl.load(scales + high_cached * PAGE + high_key + probed)
        high_sizes += (size.to(tl.float32),)  # type: ignore[assignment]
    overlap.wait(OVERLAP)
    mine = tl.load(
        query + (line * GROUP + heads)[:, None] * DIM + channel[None],
        (heads < GROUP)[:, None] & (channel < DIM)[None],
        0.0,
    )  # [HEADS, WIDTH]
    centre = tl.dot(mean, tl.trans(mine), input_precision="ieee") * (scale * LOG2E)
    if BIASED:
        distance = (own * PAGE - (tl.load(lengths + row) - 1)).to(tl.float32)
        centre += load_slopes(slopes, kv_head, heads, GROUP)[None] * distance[:, None]
    # Heads that are none are of no mass.
    centre = tl.where((heads < GROUP)[None], centre, float("-inf"))  # [CHUNK, HEADS]
    centres += line * pages * PADDED
    tl.store(
        centres + own[:, None] * PADDED + heads[None],
        centre,
        (own < stop)[:, None] & (heads < PADDED)[None],
    )
    tl.debug_barrier()
    for some in tl.static_range(SETS):
        set_planes = load_planes(planes + (line * SETS + some) * (STEPS * 4 * 32), STEPS)
        set_factors = load_factors(factors, line, PADDED, some)
        head = some * 4 + member
        there = head < PADDED
        if BIASED:
            slope = load_slopes(slopes, kv_head, head, GROUP)
        low_centre = tl.load(centres + low * PADDED + head, there & (low < stop), float("-inf"))
        high_centre = tl.load(centres + high * PADDED + head, there & (high < stop), float("-inf"))
        scores = ()
        peak = tl.full((32,), float("-inf"), tl.float32)
        for probed in tl.static_range(PROBE):
            lows, highs = (), ()
            for step in tl.static_range(STEPS):
                lows += (low_words[probed * STEPS + step],)  # type: ignore[assignment]
                highs += (high_words[probed * STEPS + step],)  # type: ignore[assignment]
            sums = signed_sums(lows, highs, set_planes, STEPS)
            score = estimate(sums[0], low_sizes[probed], set_factors, low_centre)
            if BIASED:
                score += slope * (low_key + probed).to(tl.float32)
            position = low * PAGE + low_key + probed
            score = tl.where((position >= start) & (position >= sinks), score, float("-inf"))
            place = (line * pages + low) * PROBE + probed
            tl.store(probes + place * PADDED + head, score, there & (low < stop))
            next_score = estimate(sums[1], high_sizes[probed], set_factors, high_centre)
            if BIASED:
                next_score += slope * (high_key + probed).to(tl.float32)
            position = high * PAGE + high_key + probed
            free = (position >= start) & (position >= sinks)
            next_score = tl.where(free, next_score, float("-inf"))
            place = (line * pages + high) * PROBE + probed
            tl.store(probes + place * PADDED + head, next_score, there & (high < stop))
            scores += (score, next_score)  # type: ignore[assignment]
            peak = tl.maximum(peak, tl.maximum(score, next_score))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.zeros((32,), tl.float32)
        for number in tl.static_range(2 * PROBE):
            total += tl.exp2(scores[number] - safe)
        peak = tl.reshape(peak, (8, 4))
        most = tl.max(peak, 0)
        most = tl.where(most == float("-inf"), 0.0, most)
        total = tl.sum(tl.reshape(total, (8, 4)) * tl.exp2(peak - most[None]), 0)
        head = some * 4 + tl.arange(0, 4)
        tl.store(masses + head, most + tl.log2(total), head < PADDED)


@triton.jit(do_not_specialize=["sinks", "parts", "kv_heads", "pages", "stride"])
def _settle(
    masses, held, probes, starts, lengths, limits, shares, norm, marks,
    sinks, parts, kv_heads, pages, stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr,
    BLOCK: tl.constexpr, PROBE: tl.constexpr, EACH: tl.constexpr, SAMPLE: tl.constexpr,
    PAGE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One line: `kernels.masses` norm, `kernels.budget.marks`."""
    overlap.begin(OVERLAP)
    overlap.wait(OVERLAP)
    line = tl.program_id(0).to(tl.int64)
    row = line // kv_heads
    head, part, key = tl.arange(0, PADDED), tl.arange(0, PARTS), tl.arange(0, HELD // 3)
    some = tl.load(
        masses + (line * parts + part[:, None]) * PADDED + head[None],
        (part < parts)[:, None],
        float("-inf"),
    )  # [PARTS, PADDED]
    some += tl.log2(EACH * 1.0)
    top = tl.max(some, 0)
    for third in tl.static_range(3):
        near = tl.load(held + (line * PADDED + head)[:, None] * HELD + third * PAGE + key[None])
        top = tl.maximum(top, tl.max(near, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(some - safe[None]), 0)
    certain = tl.zeros((PADDED,), tl.float32)
    for third in tl.static_range(3):
        near = tl.load(held + (line * PADDED + head)[:, None] * HELD + third * PAGE + key[None])
        certain += tl.sum(tl.exp2(near - safe[:, None]), 1)
    whole = safe + tl.log2(total + certain)  # [PADDED]
    tl.store(norm + line * PADDED + head, whole)
    share = tl.where(head < GROUP, certain / (total + certain), 0.0)
    always_mass = tl.sum(share, 0) / GROUP

    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    stop = tl.maximum(length // PAGE - 1, 0) * PAGE
    always = tl.maximum(tl.minimum(stop, sinks) - start, 0) + length - tl.maximum(start, stop)
    free = tl.maximum(stop - tl.maximum(start, sinks), 0)
    limits += row * stride
    coverage, worth = tl.load(limits), tl.load(limits + 1) / (length - start).to(tl.float32)
    fewest, most = tl.load(limits + 2).to(tl.int32), tl.load(limits + 3).to(tl.int32)
    most = tl.maximum(most - always, SAMPLE)
    chosen = tl.minimum(tl.maximum(fewest - always, max(SAMPLE, 1)), most)
    if chosen < tl.minimum(most, free):
        first, last = start // PAGE * PROBE, stop // PAGE * PROBE
        _share_out(
            probes, shares, whole, line, pages, first, last, head, GROUP, PADDED, BLOCK, PROBE
        )
        tl.debug_barrier()
        keys, mass = _met(shares, line, pages, first, last, chosen, BLOCK, PROBE, EACH)
        going = mass + always_mass < coverage
        while going:
            more = tl.minimum(2 * chosen, most)
            keys_of_more, mass_of_more = _met(
                shares, line, pages, first, last, more, BLOCK, PROBE, EACH
            )
            going = (more > chosen) & (mass_of_more - mass >= worth * (keys_of_more - keys))
            if going:
                chosen, keys, mass = more, keys_of_more, mass_of_more
                going = mass + always_mass < coverage
    # Where the mass is not finite nothing is drawn: the keys always read show it.
    sound = (whole == whole) & (tl.abs(whole) != float("inf"))
    lost = tl.sum(tl.where((head < GROUP) & ~sound, 1, 0), 0) > 0
    tl.store(marks + line, tl.where(chosen >= free, -1, tl.where(lost, 0, chosen)))


@triton.jit
def _share_out(
    probes, shares, whole, line, pages, first, last, head,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PROBE: tl.constexpr,
):  # fmt: skip
    """Shares of the probed keys, mean over the group's heads."""
    for block in range(first, last, BLOCK):
        key = block + tl.arange(0, BLOCK)
        score = tl.load(
            probes + (line * pages * PROBE + key)[:, None] * PADDED + head[None],
            (key < last)[:, None] & (head < GROUP)[None],
            float("-inf"),
        )
        share = tl.sum(tl.exp2(score - whole[None]), 1) / GROUP
        tl.store(shares + line * pages * PROBE + key, share, key < last)


@triton.jit
def _met(
    shares, line, pages, first, last, number,
    BLOCK: tl.constexpr, PROBE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """How many keys `number` marks meet, and the share of the mass on them."""
    keys, mass = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for block in range(first, last, BLOCK):
        key = block + tl.arange(0, BLOCK)
        share = tl.load(shares + line * pages * PROBE + key, key < last, 0.0)
        met = tl.minimum(share * number.to(tl.float32), 1.0)
        keys += met
        mass += share * met
    return EACH * tl.sum(keys, 0), EACH * tl.sum(mass, 0)
