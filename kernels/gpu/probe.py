"""A first look at few keys: about how much mass there is, and how many keys to read.

Also scores every page's mean, which the scan builds on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.budget import EACH, PROBE
from kernels.gpu.codes import estimate, load_factors, load_steps, signed_sums
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.layout import HELD
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

CHUNK = 8
"""Pages a program takes, for each of those whose codes stand side by side."""
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
    parts = -(-layout.pages // (CHUNK * layout.together))
    masses = torch.empty(layout.lines, parts, layout.padded, device=query.device)
    _probe[layout.lines, parts](
        query, cache.key_mean, cache.codes.view(torch.int8), cache.scale, rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.steps, scratch.factors,
        scratch.centres, scratch.probes, masses,
        scale, sinks, rows.queries, layout.kv_heads, layout.pages, rows.block_tables.stride(0),
        cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, DIM=layout.head_dim,
        WIDTH=triton.next_power_of_2(layout.head_dim), OCTETS=layout.octets,
        TOGETHER=layout.together, CHUNK=CHUNK, PROBE=PROBE, EACH=EACH, PAGE=PAGE,
        BIASED=cache.slopes is not None, num_warps=1,
    )  # fmt: skip
    shares = torch.empty(layout.lines, layout.pages * PROBE, device=query.device)
    _settle[(layout.lines,)](
        masses, scratch.held, scratch.probes, rows.starts, rows.lengths, limits, shares,
        scratch.norm, scratch.marks,
        sinks, parts, layout.kv_heads, layout.pages, 4 if limits.shape[0] > 1 else 0,
        GROUP=layout.group, PADDED=layout.padded, PARTS=triton.next_power_of_2(parts),
        HELD=HELD, BLOCK=BLOCK, PROBE=PROBE, EACH=EACH, SAMPLE=fewest, PAGE=PAGE, num_warps=4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["sinks", "queries", "kv_heads", "pages", "table_stride", "cache_pages"]
)
def _probe(
    query, means, codes, scales, tables, starts, lengths, slopes, steps, factors, centres, probes,
    masses, scale, sinks, queries, kv_heads, pages, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    OCTETS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr, PROBE: tl.constexpr,
    EACH: tl.constexpr, PAGE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A part of one line's pages."""
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, stop = tl.load(starts + row), tl.maximum(tl.load(lengths + row) // PAGE - 1, 0)
    columns: tl.constexpr = TOGETHER * PADDED
    deep: tl.constexpr = TOGETHER * OCTETS
    masses += (line * tl.num_programs(1) + part) * PADDED + tl.arange(0, PADDED)
    first = part * (TOGETHER * CHUNK)
    if (first >= stop) | ((first + TOGETHER * CHUNK) * PAGE <= start):
        tl.store(masses, tl.full((PADDED,), float("-inf"), tl.float32))
        return
    table, base = tables + (row // queries) * table_stride, kv_head * cache_pages
    # Of a product's row r the pages r // PROBE, CHUNK behind that, and so on, side by side.
    tested, column, octet = tl.arange(0, CHUNK * PROBE), tl.arange(0, columns), tl.arange(0, deep)
    head, ahead = column % PADDED, tested // PROBE
    line_steps = load_steps(steps, line, deep, columns)
    line_factors = load_factors(factors, line, head[None], PADDED)
    # The means of the pages side by side, one behind the other.
    channel = tl.arange(0, WIDTH)
    own = first + tl.arange(0, TOGETHER)[None] * CHUNK + tl.arange(0, CHUNK)[:, None]
    cached = base + tl.load(table + tl.minimum(own, stop - 1))  # [CHUNK, TOGETHER]
    mean = tl.load(
        means + cached[:, :, None] * DIM + channel[None, None],
        (own < stop)[:, :, None] & (channel < DIM)[None, None],
        0.0,
    )
    # Where the probed keys have their codes, and their scales.
    data, sizes = tl.zeros((CHUNK * PROBE, deep), tl.int64), ()
    for beside in tl.static_range(TOGETHER):
        own = first + beside * CHUNK + ahead  # [CHUNK * PROBE]
        key = own * 7 % EACH * PROBE + tested % PROBE
        cached = base + tl.load(table + own, own < stop, 0)
        one = cached * (OCTETS * PAGE) + key * 8
        data = tl.where((octet // OCTETS == beside)[None], one[:, None], data)
        sizes += (tl.load(scales + cached * PAGE + key),)  # type: ignore[assignment]
    data += (octet % OCTETS // 8 * (PAGE * 8) + octet % 8)[None]
    data = tl.load(codes + tl.max_contiguous(tl.multiple_of(data, (1, 8)), (1, 8)))
    across = tl.arange(0, TOGETHER * WIDTH)
    mine = tl.load(
        query + (line * GROUP + head)[None] * DIM + (across % WIDTH)[:, None],
        ((across // WIDTH)[:, None] == (column // PADDED)[None])
        & (head < GROUP)[None] & (across % WIDTH < DIM)[:, None],
        0.0,
    )  # fmt: skip  # [TOGETHER * WIDTH, columns]
    mean = tl.reshape(mean, (CHUNK, TOGETHER * WIDTH))
    centre = tl.dot(mean, mine, input_precision="ieee") * (scale * LOG2E)
    # Heads that are none are of no mass.
    centre = tl.where((head < GROUP)[None], centre, float("-inf"))  # [CHUNK, columns]
    own = first + tl.arange(0, CHUNK)[:, None] + (column // PADDED * CHUNK)[None]
    if BIASED:
        slope = load_slopes(slopes, kv_head, head, GROUP)[None]
        centre += slope * (own * PAGE - (tl.load(lengths + row) - 1)).to(tl.float32)
    tl.store(centres + (line * pages + own) * PADDED + head[None], centre, own < stop)
    centre = tl.broadcast_to(centre[:, None], (CHUNK, PROBE, columns))
    centre = tl.reshape(centre, (CHUNK * PROBE, columns))
    size = tl.broadcast_to(sizes[0][:, None], (CHUNK * PROBE, columns))  # type: ignore[misc]
    for beside in tl.static_range(1, TOGETHER):
        size = tl.where((column // PADDED == beside)[None], sizes[beside][:, None], size)
    score = estimate(signed_sums(data, line_steps), size.to(tl.float32), line_factors, centre)
    own = first + ahead[:, None] + (column // PADDED * CHUNK)[None]
    key = own * 7 % EACH * PROBE + (tested % PROBE)[:, None]
    if BIASED:
        score += slope * key.to(tl.float32)
    position = own * PAGE + key
    free = (own < stop) & (position >= start) & (position >= sinks)
    score = tl.where(free, score, float("-inf"))
    place = (line * pages + own) * PROBE + (tested % PROBE)[:, None]
    tl.store(probes + place * PADDED + head[None], score, own < stop)
    # Side by side stand the same heads.
    score = tl.reshape(score, (CHUNK * PROBE, TOGETHER, PADDED))
    peak = tl.max(tl.max(score, 0), 0)  # [PADDED]
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.sum(tl.exp2(score - peak[None, None]), 0), 0)
    tl.store(masses, peak + tl.log2(total))


@triton.jit(do_not_specialize=["sinks", "parts", "kv_heads", "pages", "stride"])
def _settle(
    masses, held, probes, starts, lengths, limits, shares, norm, marks,
    sinks, parts, kv_heads, pages, stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr,
    BLOCK: tl.constexpr, PROBE: tl.constexpr, EACH: tl.constexpr, SAMPLE: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """One line: `kernels.masses` norm, `kernels.budget.marks`."""
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
