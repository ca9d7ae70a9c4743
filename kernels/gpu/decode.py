"""Dynamic selection and attention of single query rows: five launches or six, and no wait.

What is launched depends on the policy and the block table's size alone, and lengths are read on
the device, so that a CUDA graph can hold it. Of other rows a result depends on how many there are
and on the table's width alone, and that in rounding only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.budget import SAMPLE
from kernels.dynamic import Attended
from kernels.gpu import overlap
from kernels.gpu.lanes import log2
from kernels.gpu.launch import MULTIPROCESSORS, PROGRAMS, mostly_cache
from kernels.gpu.layout import Layout, Scratch
from kernels.gpu.look import Look, always_read, look
from kernels.gpu.prepare import LOG2E, prepare
from kernels.gpu.probe import probe
from kernels.gpu.scan import WARPS, scan
from kernels.gpu.settle import settle
from kernels.gpu.softmax import finite
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.timing import Phases

AT_ONCE = 8 * MULTIPROCESSORS
"""Programs of a scan that read the keys they meet as well.

More of them do so faster in a launch of their own: a scan's programs then have more room.
"""
CHANNELS = 32
"""Of a head, that a program joins at least."""
PART = 2048
"""Numbers that it joins, at the most where it could take fewer channels; twice as many a warp."""


def choose(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> tuple[Layout, Scratch, Tensor]:
    """Find each line's keys; what they are is in the scratch memory, and their positions beside."""
    with phases.time("score", query.device):
        layout, scratch = look_over(query, cache, rows, policy, scale)
    positions = scratch.positions()
    with phases.time("select", query.device):
        scan(query, cache, rows, policy.sinks, scale, layout, scratch, positions=positions)
    return layout, scratch, positions


def look_over(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    limits: Tensor | None = None,
) -> tuple[Layout, Scratch]:
    """All that comes before the scan: the query as the codes need it, the norm, the marks."""
    layout = Layout.of(query, cache, rows)
    scratch = Scratch.of(layout, query.device)
    prepare(query, cache, rows, policy.sinks, scale, layout, scratch)
    probe(query, cache, rows, policy.sinks, scale, layout, scratch)
    limits = limits_of(policy, query.device) if limits is None else limits
    fewest = SAMPLE if policy.sampled else 0
    settle(rows, policy.sinks, limits, layout, scratch, fewest)
    return layout, scratch


def attend(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases,
    limits: Tensor | None = None,
) -> Attended:
    """Select by content, and attend to what is selected; see `kernels.dynamic.attend`.

    Where few programs scan the codes, they read the keys they meet as well, and the time of
    selecting has that of attending in it. `limits`, float32 [rows, 4], are `Dynamic.limits` of each
    row; by default they are the policy's.
    """
    query = query.contiguous()
    with phases.time("score", query.device):
        layout, scratch = look_over(query, cache, rows, policy, scale, limits)
    at_once = layout.parts == 1 and layout.lines * layout.spans <= AT_ONCE
    parts = Look.of(query, scale, layout, WARPS if at_once else None)
    # Where scores depend on distance.
    positions = None if cache.slopes is None else scratch.positions()
    looks = parts if at_once else None
    with phases.time("select", query.device):
        rest = (policy.sinks, scale, layout, scratch)
        scan(query, cache, rows, *rest, positions=positions, look=looks)
    with phases.time("attend", query.device):
        if not at_once:
            look(cache, rows, layout, scratch, parts, positions)
        return _united(rows, policy.sinks, layout, scratch, parts)


@lru_cache
def limits_of(policy: Dynamic, device: torch.device) -> Tensor:
    """A policy's limits as `settle` reads them: float32 [1, 4]."""
    return torch.tensor([policy.limits], device=device)


def _united(rows: Rows, sinks: int, layout: Layout, scratch: Scratch, parts: Look) -> Attended:
    count, heads, splits, head_dim = parts.outputs.shape
    width, overlaps = triton.next_power_of_2(head_dim), overlap.possible(parts.query.device)
    found = Attended(
        selection=None,
        output=torch.empty_like(parts.query),
        lse=parts.lses.new_empty(count, heads),
        own=parts.lses.new_empty(count, heads),
        coverage=parts.lses.new_empty(count, heads),
        keys=scratch.counts.new_empty(count, layout.kv_heads),
    )
    piece, together = min(CHANNELS, width), triton.next_power_of_2(splits)
    while piece < width and piece * together < PART and count * heads * width > PROGRAMS * piece:
        piece *= 2
    warps = min(8, max(1, piece * together // (2 * PART)))
    kernel = _unite[count, heads, width // piece](
        parts.outputs, parts.lses, parts.owns, rows.starts, rows.lengths, scratch.counts,
        found.output, found.lse, found.own, found.coverage, found.keys,
        sinks, splits, layout.kv_heads, layout.spans,
        GROUP=layout.group, SPLITS=together, DIM=head_dim, CHANNELS=piece,
        SPANS=triton.next_power_of_2(layout.spans), PAGE=PAGE, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=warps,
    )  # fmt: skip
    mostly_cache(kernel)
    return found


@triton.jit(do_not_specialize=["sinks", "splits", "kv_heads", "spans"])
def _unite(
    outputs, lses, owns, starts, lengths, counts, output, lse, own, coverage, keys,
    sinks, splits, kv_heads, spans,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    SPANS: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some channels of one row and head; and what share of the mass the keys read carry."""
    overlap.begin(OVERLAP)
    row, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    overlap.wait(OVERLAP)
    place = row * tl.num_programs(1) + head
    line = row * kv_heads + head // GROUP
    split, span = tl.arange(0, SPLITS), tl.arange(0, SPANS)
    channel = piece * CHANNELS + tl.arange(0, CHANNELS)
    data = tl.load(
        outputs + (place * splits + split)[:, None] * DIM + channel[None],
        (split < splits)[:, None] & (channel < DIM)[None],
        0.0,
    ).to(tl.float32)  # [SPLITS, CHANNELS]
    part = tl.load(lses + place * splits + split, split < splits, float("-inf"))
    peak, mass = _combined(part)
    mean = tl.sum(data * tl.exp2(part - peak)[:, None], 0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(output + place * DIM + channel, mean.to(output.dtype.element_ty), channel < DIM)
    if piece == 0:
        whole = peak + log2(mass)
        part = tl.load(owns + place * splits + split, split < splits, float("-inf"))
        peak, mass = _combined(part)
        carried = peak + log2(mass)
        tl.store(lse + place, whole * (1.0 / LOG2E))
        tl.store(own + place, carried * (1.0 / LOG2E))
        tl.store(coverage + place, tl.exp2(carried - whole))
        amount = tl.load(counts + line * spans + span, span < spans, 0)
        certain = always_read(start, length, sinks, PAGE)
        tl.store(keys + line, certain + tl.sum(amount, 0), head % GROUP == 0)


@triton.jit
def _combined(part):
    """Peak and mass above it of the splits' log-sum-exps, to base 2."""
    peak = finite(tl.max(part, 0))
    return peak, tl.sum(tl.exp2(part - peak), 0)
