"""Dynamic selection and attention of single query rows: six launches, and no wait.

What is launched depends on the policy and the block table's width alone, and lengths are read on
the device, so that a CUDA graph can hold it. Of other rows a result depends on the table's width
alone, and that in rounding only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.budget import SAMPLE
from kernels.dynamic import Attended
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.layout import HELD, Layout, Scratch
from kernels.gpu.prepare import LOG2E, prepare
from kernels.gpu.probe import probe
from kernels.gpu.scan import CERTAIN, PLACE_BITS, PLACES, scan
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.timing import Phases

BLOCK = 32
"""Keys that a program reads at once."""
EACH = 32
"""Keys of a program that reads keys always read."""
SPLITS = 64
"""Most programs of a line that read others."""
PARTS = 32
"""Programs of a line that has fewer segments, at least."""
CHANNELS = 32
"""Of a head, that a program joins."""


def choose(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> tuple[Layout, Scratch]:
    """Find each line's keys; what they are is in the scratch memory."""
    with phases.time("score", query.device):
        layout, scratch = look_over(query, cache, rows, policy, scale)
    with phases.time("select", query.device):
        scan(cache, rows, policy.sinks, layout, scratch)
    return layout, scratch


def look_over(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float
) -> tuple[Layout, Scratch]:
    """All that comes before the scan: the query as the codes need it, the norm, the marks."""
    layout = Layout.of(query, cache, rows)
    scratch = Scratch.of(layout, query.device)
    prepare(query, cache, rows, policy.sinks, scale, layout, scratch)
    probe(
        query, cache, rows, policy.sinks, scale, limits_of(policy, query.device), layout, scratch,
        fewest=SAMPLE if policy.sampled else 0,
    )  # fmt: skip
    return layout, scratch


def attend(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Attended:
    """Select by content, and attend to what is selected; see `kernels.dynamic.attend`."""
    query = query.contiguous()
    layout, scratch = choose(query, cache, rows, policy, scale, phases)
    with phases.time("attend", query.device):
        return _look(query, cache, rows, policy.sinks, scale, layout, scratch)


@lru_cache
def limits_of(policy: Dynamic, device: torch.device) -> Tensor:
    """A policy as `probe` reads it; who captures a launch in a graph has to hold it."""
    numbers = [policy.coverage, policy.worth, float(policy.min_keys), float(policy.max_keys)]
    return torch.tensor([numbers], device=device)


def _look(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    layout: Layout,
    scratch: Scratch,
) -> Attended:
    count, heads, head_dim = query.shape
    # A program has a part of the keys always read; or the keys of some segments, or a part of them.
    span = int(triton.next_power_of_2(-(-layout.segments // SPLITS)))
    spans = -(-layout.segments // span)
    parts = max(1, PARTS // spans)
    splits = HELD // EACH + spans * parts
    outputs = torch.empty(count, heads, splits, head_dim, device=query.device)
    lses = outputs.new_empty(2, count, heads, splits)
    width = triton.next_power_of_2(head_dim)
    _attend[layout.lines, splits](
        query, cache.kv, rows.block_tables, rows.starts, rows.lengths, scratch.marked,
        scratch.counts, scratch.marks, slopes_of(cache), outputs, lses[0], lses[1],
        scale * LOG2E.value, sinks, rows.queries, layout.kv_heads, rows.block_tables.stride(0),
        cache.kv.shape[1], layout.segments, parts,
        GROUP=layout.group, HEADS=max(8, layout.padded), DIM=head_dim, WIDTH=width, SPAN=span,
        HELD=HELD, EACH=EACH, BLOCK=BLOCK, PAGE=PAGE, BIASED=cache.slopes is not None,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    found = Attended(
        selection=None,
        output=torch.empty_like(query),
        lse=lses.new_empty(count, heads),
        own=lses.new_empty(count, heads),
        coverage=lses.new_empty(count, heads),
        keys=torch.empty(count, layout.kv_heads, dtype=torch.int32, device=query.device),
    )
    piece = min(CHANNELS, width)
    _unite[count, heads, width // piece](
        outputs, lses[0], lses[1], rows.starts, rows.lengths, scratch.counts,
        found.output, found.lse, found.own, found.coverage, found.keys,
        sinks, splits, layout.kv_heads, layout.segments,
        GROUP=layout.group, SPLITS=triton.next_power_of_2(splits), DIM=head_dim, CHANNELS=piece,
        SEGMENTS=triton.next_power_of_2(layout.segments), PAGE=PAGE, num_warps=1,
    )  # fmt: skip
    return found


@triton.jit(
    do_not_specialize=[
        "sinks",
        "queries",
        "kv_heads",
        "table_stride",
        "cache_pages",
        "segments",
        "parts",
    ]
)
def _attend(
    query, kv, tables, starts, lengths, marked, counts, marks, slopes, outputs, lses, owns,
    scale, sinks, queries, kv_heads, table_stride, cache_pages, segments, parts,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SPAN: tl.constexpr, HELD: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One line over some of the keys always read, or the keys met in some segments.

    Keys are the rows of the products and heads their columns: few heads would leave most rows of a
    tensor core's product empty.
    """
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    head, channel, member = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    inside, there = channel < DIM, head < GROUP
    wide = inside[:, None] & there[None]
    mine = tl.load(query + (line * GROUP + head)[None] * DIM + channel[:, None], wide, 0.0)
    table, base = tables + (row // queries) * table_stride, kv_head * cache_pages * PAGE
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    stop = tl.maximum(length // PAGE - 1, 0) * PAGE
    # Sinks, the recent window's two pages, or segments.
    drawn = split >= HELD // EACH
    nth = tl.maximum(split - HELD // EACH, 0)
    always = tl.where(split < PAGE // EACH, 0, stop - PAGE) + split * EACH
    end = tl.where(split < PAGE // EACH, tl.minimum(stop, sinks), tl.where(drawn, 0, length))
    first = tl.where(drawn, nth // parts, -1) * SPAN
    segment = first + tl.arange(0, SPAN)
    amount = tl.load(
        counts + line * segments + segment, (segment >= 0) & (segment < segments), 0
    )  # [SPAN]
    ends = tl.cumsum(amount, 0)
    met_here = tl.sum(amount, 0)
    total = tl.where(drawn, met_here, EACH)
    marked += (line * segments + first) * PLACES
    # Where the mass is not finite nothing was drawn, and that shows.
    plain = tl.where(tl.load(marks + line) == 0, float("nan"), CERTAIN * 1.0)
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    mass, own_mass = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((WIDTH, HEADS), tl.float32)
    step = tl.where(drawn, parts, 1) * BLOCK
    for block in range(nth % parts * BLOCK, total, step):
        number = block + member
        before = ends[None] <= number[:, None]  # [BLOCK, SPAN]
        own = tl.sum(before.to(tl.int32), 1)
        slot = own * PLACES + number - tl.sum(tl.where(before, amount[None], 0), 1)
        met = tl.load(marked + slot, number < met_here, 0)
        position = tl.where(drawn, (first + own) * PLACES + met % PLACES, always + number)
        seen = (number < met_here) | ((position >= start) & (position < end))
        size = tl.where(drawn, (met >> PLACE_BITS).to(tl.float32), plain)  # 2 ** 18 p
        page = tl.load(table + position // PAGE, seen, 0)
        data = kv + (base + page * PAGE + position % PAGE)[:, None] * (2 * DIM) + channel[None]
        keys = tl.load(data, seen[:, None] & inside[None], 0.0)  # [BLOCK, WIDTH]
        values = tl.load(data + DIM, seen[:, None] & inside[None], 0.0)
        score = tl.dot(keys, mine, input_precision="ieee") * scale  # [BLOCK, HEADS]
        if BIASED:
            distance = (position - (length - 1)).to(tl.float32)
            score += load_slopes(slopes, kv_head, head, GROUP)[None] * distance[:, None]
        # Each key counts 1 / p times.
        score = tl.where(seen[:, None], score - tl.log2(size / CERTAIN)[:, None], float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - safe)
        part = tl.exp2(score - safe[None])
        mass = mass * shrink + tl.sum(part, 0)
        own_mass = own_mass * shrink + tl.sum(part * size[:, None], 0)
        sums = tl.dot(
            tl.trans(values), part.to(values.dtype), sums * shrink[None], input_precision="ieee"
        )
        peak = higher
    place = (line * GROUP + head) * tl.num_programs(1) + split
    output = sums / tl.where(mass == 0.0, 1.0, mass)[None]
    tl.store(outputs + place[None] * DIM + channel[:, None], output, wide)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(lses + place, peak + tl.log2(mass), there)
    tl.store(owns + place, peak + tl.log2(own_mass / CERTAIN), there)


@triton.jit(do_not_specialize=["sinks", "splits", "kv_heads", "segments"])
def _unite(
    outputs, lses, owns, starts, lengths, counts, output, lse, own, coverage, keys,
    sinks, splits, kv_heads, segments,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    SEGMENTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Some channels of one row and head; and what share of the mass the keys read carry."""
    row, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = row * tl.num_programs(1) + head
    line = row * kv_heads + head // GROUP
    split, segment = tl.arange(0, SPLITS), tl.arange(0, SEGMENTS)
    channel = piece * CHANNELS + tl.arange(0, CHANNELS)
    data = tl.load(
        outputs + (place * splits + split)[:, None] * DIM + channel[None],
        (split < splits)[:, None] & (channel < DIM)[None],
        0.0,
    )  # [SPLITS, CHANNELS]
    part = tl.load(lses + place * splits + split, split < splits, float("-inf"))
    peak, mass = _combined(part)
    share = tl.exp2(part - peak) / tl.where(mass == 0.0, 1.0, mass)
    mean = tl.sum(data * share[:, None], 0)
    tl.store(output + place * DIM + channel, mean.to(output.dtype.element_ty), channel < DIM)
    if piece == 0:
        whole = peak + tl.log2(mass)
        part = tl.load(owns + place * splits + split, split < splits, float("-inf"))
        peak, mass = _combined(part)
        carried = peak + tl.log2(mass)
        tl.store(lse + place, whole / LOG2E)
        tl.store(own + place, carried / LOG2E)
        tl.store(coverage + place, tl.exp2(carried - whole))
        amount = tl.load(counts + line * segments + segment, segment < segments, 0)
        start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
        stop = tl.maximum(length // PAGE - 1, 0) * PAGE
        certain = tl.maximum(tl.minimum(stop, sinks) - start, 0) + length - tl.maximum(start, stop)
        tl.store(keys + line, certain + tl.sum(amount, 0), head % GROUP == 0)


@triton.jit
def _combined(part):
    """Peak and mass above it of the splits' log-sum-exps, to base 2."""
    peak = tl.max(part, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, tl.sum(tl.exp2(part - peak), 0)
