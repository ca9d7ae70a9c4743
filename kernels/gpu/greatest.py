"""The keys of the greatest priority, and what each of them stands for (`kernels.sample`).

Counts of the priorities by eight bits, four times, name the greatest one that is not read; counts
are whole numbers, and so the same whatever the order in which programs add to them. Two more passes
count and write, in the order of the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.budget import fewest
from kernels.gpu.launch import splits_for
from kernels.gpu.shares import BLOCK, number
from kernels.gpu.spans import NEAR, amounts, edges
from kernels.page import PAGE
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.gpu.masses import Masses
    from kernels.gpu.shares import Ranked
    from kernels.policy import Dynamic

TINY = tl.constexpr(2.0**-126)
"""The least float32 that no GPU takes for 0."""


def take(
    found: Masses, norm: Tensor, ranked: Ranked, wanted: Tensor, policy: Dynamic
) -> tuple[Selection, Tensor]:
    """Read the `wanted` keys of the greatest priority, the sinks and the recent window.

    Args:
        found: the keys' masses.
        norm: float32 [rows, kv_heads, group], log of a head's whole mass.
        ranked: the keys' priorities.
        wanted: int32 [rows, kv_heads], how many; at most those that may be drawn.
        policy: the budget.

    Returns:
        The selection, and float32 [rows, heads], the share of the estimated mass that it does not
        stand for.
    """
    rows, kv_heads, group, keys = found.scores.shape
    lines, blocks = rows * kv_heads, max(1, -(-keys // BLOCK))
    splits = splits_for(lines, blocks)
    size, device = -(-blocks // splits), norm.device
    bits, counts, grid = ranked.bits, ranked.counts, (lines, splits)
    for level in (1, 2, 3):
        _count[grid](
            bits, counts, wanted, found.stops, kv_heads, keys, found.first, size,
            LEVEL=level, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
        )  # fmt: skip
    before = torch.empty(lines, splits, 2, dtype=torch.int32, device=device)
    _tell[grid](
        bits, counts, wanted, found.stops, before, kv_heads, keys, found.first, size,
        BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    always = NEAR + policy.sinks  # at most
    capacity = min(max(policy.max_keys, always + fewest(policy)), keys + NEAR)
    indices = torch.empty(rows, kv_heads, capacity, dtype=torch.int64, device=device)
    weights = norm.new_empty(indices.shape) if policy.sampled else None
    sizes = indices.new_empty(rows, kv_heads)
    missing = norm.new_empty(rows, kv_heads, group, splits)
    _write[grid](
        found.scores, norm, bits, counts, wanted, before, found.starts, found.stops, found.lengths,
        indices, missing if weights is None else weights, sizes, missing,
        kv_heads, keys, found.first, policy.sinks, capacity, size,
        GROUP=group, HEADS=triton.next_power_of_2(group), SPLITS=triton.next_power_of_2(splits),
        SAMPLED=policy.sampled, NEAR=NEAR, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return Selection(indices, sizes, weights), missing.sum(-1).flatten(1)


@triton.jit
def _narrow(counts, line, rank, LEVELS: tl.constexpr):
    """The bits of the `rank`-th greatest priority that `LEVELS` counts tell, and its rank there.

    Its rank among the keys with just these bits; -1 in place of the bits where fewer keys are there
    at all.
    """
    digit = tl.arange(0, 256)
    prefix, short = 0, False
    for level in tl.static_range(LEVELS):
        amount = tl.load(counts + line * 1024 + level * 256 + digit)
        above = tl.sum(amount, 0) - tl.cumsum(amount, 0)  # of the greater digits
        enough = above + amount >= rank
        if level == 0:
            short = tl.sum(enough.to(tl.int32), 0) == 0
        place = tl.max(tl.where(enough, digit, 0), 0)
        rank -= tl.sum(tl.where(digit == place, above, 0), 0)
        prefix = (prefix << (7 if level == 3 else 8)) | place
    return tl.where(short, -1, prefix), tl.where(short, 1, rank)


@triton.jit(do_not_specialize=["kv_heads", "keys", "first", "blocks"])
def _count(
    bits, counts, wanted, stops, kv_heads, keys, first, blocks,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Among the keys with the bits so far, how many there are of each of the next bits."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    prefix, _ = _narrow(counts, line, tl.load(wanted + line) + 1, LEVEL)
    before: tl.constexpr = 31 - 8 * LEVEL
    after: tl.constexpr = 23 - 8 * LEVEL if LEVEL < 3 else 0
    keys = tl.multiple_of(keys, PAGE)
    amount = tl.zeros((256,), tl.int32)
    low = split * blocks * BLOCK
    stop = tl.load(stops + line // kv_heads).to(tl.int32) - first
    end = tl.minimum(tl.minimum(low + blocks * BLOCK, keys), stop)
    end = tl.where(prefix < 0, low, end)  # all keys are read
    for block in range(low, end, BLOCK):
        key = block + tl.arange(0, BLOCK)
        order = tl.load(bits + line * keys + key, key < end, -1)
        same = (order >= 0) & ((order >> before) == prefix)
        if tl.max(same.to(tl.int32), 0) > 0:  # at the last levels rarely
            next_bits = (order >> after) & (127 if LEVEL == 3 else 255)
            amount += tl.histogram(next_bits, 256, same)
    tl.atomic_add(counts + line * 1024 + LEVEL * 256 + tl.arange(0, 256), amount, amount > 0)


@triton.jit(do_not_specialize=["kv_heads", "keys", "first", "blocks"])
def _tell(
    bits, counts, wanted, stops, before, kv_heads, keys, first, blocks,
    BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """How many keys of this split are above the threshold, and how many are equal to it."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    threshold, _ = _narrow(counts, line, tl.load(wanted + line) + 1, 4)
    keys = tl.multiple_of(keys, PAGE)
    above = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    low = split * blocks * BLOCK
    stop = tl.load(stops + line // kv_heads).to(tl.int32) - first
    end = tl.minimum(tl.minimum(low + blocks * BLOCK, keys), stop)
    for block in range(low, end, BLOCK):
        key = block + tl.arange(0, BLOCK)
        order = tl.load(bits + line * keys + key, key < end, -1)
        above += ((order >= 0) & (order > threshold)).to(tl.int32)
        equal += ((order >= 0) & (order == threshold)).to(tl.int32)
    place = before + (line * tl.num_programs(1) + split) * 2
    tl.store(place, tl.sum(above, 0))
    tl.store(place + 1, tl.sum(equal, 0))


@triton.jit(do_not_specialize=["kv_heads", "keys", "first", "sinks", "capacity", "blocks"])
def _write(
    scores, norm, bits, counts, wanted, before, starts, stops, lengths,
    indices, weights, sizes, missing,
    kv_heads, keys, first, sinks, capacity, blocks,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, SAMPLED: tl.constexpr,
    NEAR: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The drawn keys of this split, behind those of the splits before it, and what they miss."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, (line % kv_heads).to(tl.int32)
    start, stop, length = edges(starts, stops, lengths, row)
    certain, _free, seen = amounts(start, stop, length, sinks)
    many = tl.load(wanted + line)
    target, weight = indices + line * capacity, weights + line * capacity
    if split == 0:  # what is always read, and the padding
        late = tl.arange(0, NEAR)
        recent = certain + many + late
        tl.store(target + late, (start + late).to(tl.int64), late < certain)
        tl.store(target + recent, (tl.maximum(start, stop) + late).to(tl.int64), late < seen)
        if SAMPLED:
            tl.store(weight + late, tl.zeros((NEAR,), tl.float32), late < certain)
            tl.store(weight + recent, tl.zeros((NEAR,), tl.float32), late < seen)
        size = certain + many + seen
        tl.store(sizes + line, size.to(tl.int64))
        for block in range(size, capacity, BLOCK):
            behind = block + tl.arange(0, BLOCK)
            tl.store(target + behind, tl.full((BLOCK,), -1, tl.int64), behind < capacity)
            if SAMPLED:
                tl.store(weight + behind, tl.zeros((BLOCK,), tl.float32), behind < capacity)
    threshold, room = _narrow(counts, line, many + 1, 4)
    room -= 1  # for keys equal to it
    bound = tl.maximum(threshold, 0).to(tl.float32, bitcast=True)
    keys = tl.multiple_of(keys, PAGE)
    other, reader = tl.arange(0, SPLITS), tl.arange(0, HEADS)
    others = before + (line * tl.num_programs(1) + other) * 2
    above = tl.sum(tl.load(others, other < split, 0), 0)
    level = tl.sum(tl.load(others + 1, other < split, 0), 0)
    left = tl.zeros((HEADS,), tl.float32)
    low = split * blocks * BLOCK
    end = tl.minimum(tl.minimum(low + blocks * BLOCK, keys), stop - first)
    for block in range(low, end, BLOCK):
        key = block + tl.arange(0, BLOCK)
        order = tl.load(bits + line * keys + key, key < end, -1)
        greater = ((order >= 0) & (order > threshold)).to(tl.int32)
        equal = ((order >= 0) & (order == threshold)).to(tl.int32)
        taken = equal * (level + tl.cumsum(equal, 0) <= room).to(tl.int32)
        wins = greater + taken
        place = certain + above + tl.minimum(level, room) + tl.cumsum(wins, 0) - 1
        position = first + key
        tl.store(target + place, position.to(tl.int64), wins > 0)
        stands = wins.to(tl.float32)  # for so many keys
        if SAMPLED:
            # Log of threshold over share; of a share below TINY it does not matter.
            priority = tl.maximum(order, 0).to(tl.float32, bitcast=True)
            ratio = tl.log(tl.maximum(bound, TINY)) - tl.log(tl.maximum(priority, TINY))
            log_weight = tl.maximum(ratio - tl.log(number(position, kv_head)), 0.0)
            log_weight = tl.where((bound > 0) & (bound < float("inf")), log_weight, 0.0)
            tl.store(weight + place, log_weight, wins > 0)
            stands = tl.where(wins > 0, tl.exp(log_weight), 0.0)
        lost = tl.where(order >= 0, 1.0 - stands, 0.0)
        for head in tl.static_range(GROUP):
            one = line * GROUP + head
            score = tl.load(scores + one * keys + key, order >= 0, float("-inf"))
            mass = tl.exp(score - tl.load(norm + one))
            left += tl.where(reader == head, tl.sum(mass * lost, 0), 0.0)
        above += tl.sum(greater, 0)
        level += tl.sum(equal, 0)
    part = (line * GROUP + reader) * tl.num_programs(1) + split
    tl.store(missing + part, left, reader < GROUP)
