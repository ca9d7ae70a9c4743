"""What probed keys tell: about how much mass there is, and how many keys to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import budget
from kernels.budget import PROBE
from kernels.codes import FOURS
from kernels.gpu import overlap
from kernels.gpu.lanes import log2
from kernels.gpu.launch import mostly_cache
from kernels.gpu.layout import CHUNK, HELD
from kernels.gpu.look import always_read
from kernels.gpu.probe import apart_of
from kernels.gpu.softmax import finite
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import Rows
    from kernels.gpu.layout import Layout, Scratch

SUMMED = 2048
"""Probed keys whose shares are added up at once."""


def settle(
    rows: Rows, sinks: int, limits: Tensor, layout: Layout, scratch: Scratch, fewest: int
) -> None:
    """Settle each line's norm and marks.

    Args:
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        limits: float32 [rows or 1, 4], coverage, worth, fewest and most keys.
        layout: the launch's sizes.
        scratch: what the probe left, and what is written.
        fewest: marks that a line gets at the least.
    """
    overlaps, chunks = overlap.possible(limits.device), scratch.masses.shape[1]
    shares = torch.empty(layout.lines, chunks * CHUNK * PROBE, device=limits.device)
    kernel = _settle[(layout.lines,)](
        scratch.masses, scratch.held, scratch.probes, rows.starts, rows.lengths, limits, shares,
        scratch.norm, scratch.marks,
        sinks, chunks, layout.kv_heads, 4 if limits.shape[0] > 1 else 0,
        GROUP=layout.group, PADDED=layout.padded, CHUNKS=triton.next_power_of_2(chunks),
        HELD=HELD, SUMMED=SUMMED, PROBE=PROBE, FOURS=FOURS, FAR=budget.FAR, SAMPLE=fewest,
        CHUNK=CHUNK, PAGE=PAGE,
        OVERLAP=overlaps, launch_pdl=overlaps, num_warps=4,
    )  # fmt: skip
    mostly_cache(kernel)


@triton.jit(do_not_specialize=["sinks", "chunks", "kv_heads", "stride"])
def _settle(
    masses, held, probes, starts, lengths, limits, shares, norm, marks,
    sinks, chunks, kv_heads, stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr,
    SUMMED: tl.constexpr, PROBE: tl.constexpr, FOURS: tl.constexpr, FAR: tl.constexpr,
    SAMPLE: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One line: `kernels.masses` norm, `kernels.budget.marks`."""
    overlap.begin(OVERLAP)
    line = tl.program_id(0).to(tl.int64)
    row = line // kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    apart, stop = apart_of(length - start, FAR), tl.maximum(length // PAGE - 1, 0) * PAGE
    every = apart * (CHUNK * PAGE)
    probed = tl.maximum(tl.cdiv(stop, every) - start // every, 0)  # chunks
    limits += row * stride
    coverage, worth = tl.load(limits), tl.load(limits + 1) / (length - start).to(tl.float32)
    fewest, most = tl.load(limits + 2).to(tl.int32), tl.load(limits + 3).to(tl.int32)
    overlap.wait(OVERLAP)
    head, chunk, key = tl.arange(0, PADDED), tl.arange(0, CHUNKS), tl.arange(0, HELD // 3)
    some = tl.load(
        masses + (line * chunks + chunk[:, None]) * PADDED + head[None],
        (chunk < probed)[:, None],
        float("-inf"),
    )  # [CHUNKS, PADDED]
    each = (FOURS * apart).to(tl.float32)  # keys for which a probed one stands
    some += log2(each)
    top = tl.max(some, 0)
    for third in tl.static_range(3):
        near = tl.load(held + (line * PADDED + head)[:, None] * HELD + third * PAGE + key[None])
        top = tl.maximum(top, tl.max(near, 1))
    safe = finite(top)
    total = tl.sum(tl.exp2(some - safe[None]), 0)
    certain = tl.zeros((PADDED,), tl.float32)
    for third in tl.static_range(3):
        near = tl.load(held + (line * PADDED + head)[:, None] * HELD + third * PAGE + key[None])
        certain += tl.sum(tl.exp2(near - safe[:, None]), 1)
    whole = safe + log2(total + certain)  # [PADDED]
    tl.store(norm + line * PADDED + head, whole)
    share = tl.where(head < GROUP, certain / (total + certain), 0.0)
    always_mass = tl.sum(share, 0) / GROUP

    always = always_read(start, length, sinks, PAGE)
    free = tl.maximum(stop - tl.maximum(start, sinks), 0)
    most = tl.maximum(most - always, SAMPLE)
    chosen = tl.minimum(tl.maximum(fewest - always, max(SAMPLE, 1)), most)
    if chosen < tl.minimum(most, free):
        probes += line * chunks * (CHUNK * PADDED * PROBE)
        shares += line * chunks * (CHUNK * PROBE)
        # Probed keys: of whole chunks, of no mass where there are none.
        last = probed * (CHUNK * PROBE)
        _share_out(probes, shares, whole, last, head, GROUP, PADDED, SUMMED, PROBE)
        tl.debug_barrier()
        keys, mass = _met(shares, last, chosen, each, SUMMED)
        going = mass + always_mass < coverage
        while going:
            more = tl.minimum(2 * chosen, most)
            keys_of_more, mass_of_more = _met(shares, last, more, each, SUMMED)
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
    probes, shares, whole, last, head,
    GROUP: tl.constexpr, PADDED: tl.constexpr, SUMMED: tl.constexpr, PROBE: tl.constexpr,
):  # fmt: skip
    """Shares of the probed keys, mean over the group's heads."""
    probed = tl.arange(0, PROBE)
    for begin in range(0, last // PROBE, SUMMED // PROBE):
        page = begin + tl.arange(0, SUMMED // PROBE)
        there = page < last // PROBE
        place = (page[:, None] * PADDED + head[None]) * PROBE
        score = tl.load(
            probes + place[:, :, None] + probed[None, None],
            (there[:, None] & (head < GROUP)[None])[:, :, None],
            float("-inf"),
        )  # [pages, PADDED, PROBE]
        share = tl.sum(tl.exp2(score - whole[None, :, None]), 1) / GROUP
        tl.store(shares + page[:, None] * PROBE + probed[None], share, there[:, None])


@triton.jit
def _met(shares, last, number, each, SUMMED: tl.constexpr):
    """How many keys `number` marks meet, and the share of the mass on them."""
    keys, mass = tl.zeros((SUMMED,), tl.float32), tl.zeros((SUMMED,), tl.float32)
    for begin in range(0, last, SUMMED):
        key = begin + tl.arange(0, SUMMED)
        share = tl.load(shares + key, key < last, 0.0)
        met = tl.minimum(share * number.to(tl.float32), 1.0)
        keys += met
        mass += share * met
    return each * tl.sum(keys, 0), each * tl.sum(mass, 0)
