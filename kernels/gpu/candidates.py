"""The choice of a long context's candidates: the keys with the greatest estimated share of mass.

Shares are not negative, so their bits order as they do. Four passes count them by eight bits each,
which names the least share that is chosen; counts are whole numbers, and so the same whatever the
order in which programs add to them. Two more passes count and write, in the order of the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import splits_for
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Keys that a program reads at once."""


def choose(
    scores: Tensor, norm: Tensor, starts: Tensor, stops: Tensor, first: int, sinks: int, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` keys with the greatest mean share over a group's heads; ties to the lowest.

    Args:
        scores: float32 [rows, kv_heads, group, keys], of consecutive keys.
        norm: float32 [rows, kv_heads, group], log of a head's whole mass.
        starts: int64 [rows], first key of each row that may be chosen.
        stops: int64 [rows], end of the keys that may.
        first: position of the first key.
        sinks: keys in front of this position are chosen before all others.
        count: how many to choose, from 1.

    Returns:
        int64 [rows, kv_heads, count], ascending positions, -1 behind the last; and float32
        [rows, kv_heads], the least share chosen, or -1 where all keys are.
    """
    rows, kv_heads, group, keys = scores.shape
    lines = rows * kv_heads
    bits = torch.empty(lines, keys, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(lines, 4, 256, dtype=torch.int32, device=scores.device)
    blocks = -(-keys // BLOCK)
    splits = splits_for(lines, blocks)
    grid, size = (lines, splits), -(-blocks // splits)
    _rank[grid](
        scores, norm, starts, stops, bits, counts, kv_heads, keys, first, sinks, size,
        GROUP=group, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    for level in (1, 2, 3):
        _count[grid](
            bits, counts, keys, count, size, LEVEL=level, BLOCK=BLOCK, PAGE=PAGE, num_warps=4
        )
    found = torch.empty(lines, splits, 2, dtype=torch.int32, device=scores.device)
    chosen = torch.full((lines, count), -1, dtype=torch.int64, device=scores.device)
    least = torch.empty(lines, device=scores.device)
    _tell[grid](bits, counts, found, keys, count, size, BLOCK=BLOCK, PAGE=PAGE, num_warps=4)
    _write[grid](
        bits, counts, found, chosen, least, keys, first, count, size,
        SPLITS=triton.next_power_of_2(splits), BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return chosen.view(rows, kv_heads, count), least.view(rows, kv_heads)


@triton.jit(do_not_specialize=["kv_heads", "keys", "first", "sinks", "blocks"])
def _rank(
    scores, norm, starts, stops, bits, counts, kv_heads, keys, first, sinks, blocks,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Each key's share as bits, and how many there are of each exponent."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(starts + line // kv_heads), tl.load(stops + line // kv_heads)
    keys = tl.multiple_of(keys, PAGE)
    amount = tl.zeros((256,), tl.int32)
    low = split * blocks * BLOCK
    for block in range(low, min(low + blocks * BLOCK, keys), BLOCK):
        key = block + tl.arange(0, BLOCK)
        there = key < keys
        share = tl.zeros((BLOCK,), tl.float32)
        for head in tl.static_range(GROUP):
            score = tl.load(scores + (line * GROUP + head) * keys + key, there, float("-inf"))
            share += tl.exp(score - tl.load(norm + line * GROUP + head))
        position = first + key
        rank = (share / GROUP).to(tl.int32, bitcast=True)
        rank = tl.where(position < sinks, 0x7F800000, rank)
        may = there & (position >= start) & (position < stop)
        tl.store(bits + line * keys + key, tl.where(may, rank, -1), there)
        amount += tl.histogram((rank >> 23) & 255, 256, may)
    tl.atomic_add(counts + line * 1024 + tl.arange(0, 256), amount, amount > 0)


@triton.jit
def _narrow(counts, line, wanted, LEVELS: tl.constexpr):
    """The bits of the `wanted`-th greatest share that `LEVELS` counts tell, and how many are left.

    How many keys with just these bits are wanted; -1 in place of the bits where fewer keys than
    wanted are there at all.
    """
    digit = tl.arange(0, 256)
    prefix, short = 0, False
    for level in tl.static_range(LEVELS):
        amount = tl.load(counts + line * 1024 + level * 256 + digit)
        above = tl.sum(amount, 0) - tl.cumsum(amount, 0)  # of the greater digits
        enough = above + amount >= wanted
        if level == 0:
            short = tl.sum(enough.to(tl.int32), 0) == 0
        place = tl.max(tl.where(enough, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit == place, above, 0), 0)
        prefix = (prefix << (7 if level == 3 else 8)) | place
    return tl.where(short, -1, prefix), tl.where(short, 0, wanted)


@triton.jit(do_not_specialize=["keys", "wanted", "blocks"])
def _count(
    bits, counts, keys, wanted, blocks,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Among the keys with the bits so far, how many there are of each of the next bits."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    prefix, _ = _narrow(counts, line, wanted, LEVEL)
    before: tl.constexpr = 31 - 8 * LEVEL
    after: tl.constexpr = 23 - 8 * LEVEL if LEVEL < 3 else 0
    keys = tl.multiple_of(keys, PAGE)
    amount = tl.zeros((256,), tl.int32)
    low = split * blocks * BLOCK
    for block in range(low, min(low + blocks * BLOCK, keys), BLOCK):
        key = block + tl.arange(0, BLOCK)
        rank = tl.load(bits + line * keys + key, key < keys, -1)
        same = (rank >= 0) & ((rank >> before) == prefix)
        if tl.max(same.to(tl.int32), 0) > 0:  # at the last levels rarely
            next_bits = (rank >> after) & (127 if LEVEL == 3 else 255)
            amount += tl.histogram(next_bits, 256, same)
    tl.atomic_add(counts + line * 1024 + LEVEL * 256 + tl.arange(0, 256), amount, amount > 0)


@triton.jit(do_not_specialize=["keys", "wanted", "blocks"])
def _tell(
    bits, counts, found, keys, wanted, blocks, BLOCK: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """How many keys of this split are above the least share, and how many are equal to it."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    least, _ = _narrow(counts, line, wanted, 4)
    keys = tl.multiple_of(keys, PAGE)
    above = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    low = split * blocks * BLOCK
    for block in range(low, min(low + blocks * BLOCK, keys), BLOCK):
        key = block + tl.arange(0, BLOCK)
        rank = tl.load(bits + line * keys + key, key < keys, -1)
        above += ((rank >= 0) & (rank > least)).to(tl.int32)
        equal += ((rank >= 0) & (rank == least)).to(tl.int32)
    place = found + (line * tl.num_programs(1) + split) * 2
    tl.store(place, tl.sum(above, 0))
    tl.store(place + 1, tl.sum(equal, 0))


@triton.jit(do_not_specialize=["keys", "first", "wanted", "blocks"])
def _write(
    bits, counts, found, chosen, smallest, keys, first, wanted, blocks,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The positions of this split's chosen keys, behind those of the splits before it."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    least, room = _narrow(counts, line, wanted, 4)
    if split == 0:
        tl.store(smallest + line, tl.where(least < 0, -1.0, least.to(tl.float32, bitcast=True)))
    keys = tl.multiple_of(keys, PAGE)
    other = tl.arange(0, SPLITS)
    place = found + (line * tl.num_programs(1) + other) * 2
    above = tl.sum(tl.load(place, other < split, 0), 0)
    level = tl.sum(tl.load(place + 1, other < split, 0), 0)
    low = split * blocks * BLOCK
    for block in range(low, min(low + blocks * BLOCK, keys), BLOCK):
        key = block + tl.arange(0, BLOCK)
        rank = tl.load(bits + line * keys + key, key < keys, -1)
        greater = ((rank >= 0) & (rank > least)).to(tl.int32)
        equal = ((rank >= 0) & (rank == least)).to(tl.int32)
        taken = equal * (level + tl.cumsum(equal, 0) <= room).to(tl.int32)
        wins = greater + taken
        target = above + tl.minimum(level, room) + tl.cumsum(wins, 0) - 1
        tl.store(chosen + line * wanted + target, (first + key).to(tl.int64), wins > 0)
        above += tl.sum(greater, 0)
        level += tl.sum(equal, 0)
