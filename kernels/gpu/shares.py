"""Shares of the attention mass, and the keys' priorities (`kernels.sample`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.budget import fewest
from kernels.gpu.launch import splits_for
from kernels.gpu.spans import NEAR, amounts, edges
from kernels.page import PAGE
from kernels.sample import BITS, STEP, TURN

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.gpu.masses import Masses
    from kernels.policy import Dynamic

BLOCK = 1024
"""Keys that a program reads at once."""
LEVELS = 4
"""Counts of priorities by 8 of their bits."""
KEY_STEP = tl.constexpr(STEP - (1 << 32))  # the same, as an int32
HEAD_STEP = tl.constexpr(TURN - (1 << 32))
DROPPED = tl.constexpr(32 - BITS)
KEPT = tl.constexpr((1 << BITS) - 1)
FINE = tl.constexpr(2.0**-BITS)


@dataclass(frozen=True, slots=True)
class Totals:
    """Of each row and KV head, before keys are ranked."""

    norm: Tensor  # float32 [rows, kv_heads, group]  log of a head's whole mass
    held: Tensor  # float32 [rows, kv_heads]  share of the keys that are always read
    most: Tensor  # int32 [rows, kv_heads]  how many more may be


def totals(found: Masses, policy: Dynamic) -> Totals:
    """Sum up the masses."""
    rows, kv_heads, group, keys = found.scores.shape
    norm = found.near.new_empty(rows, kv_heads, group)
    held = found.near.new_empty(rows, kv_heads)
    most = torch.empty(rows, kv_heads, dtype=torch.int32, device=norm.device)
    _total[rows, kv_heads](
        found.scores, found.page_lse, found.near, found.starts, found.stops, found.lengths,
        norm, held, most,
        keys, keys // PAGE, found.first, policy.sinks, policy.max_keys, fewest(policy),
        GROUP=group, NEAR=NEAR, PAGE=PAGE, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return Totals(norm, held, most)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The keys' priorities."""

    bits: Tensor  # int32 [rows, kv_heads, keys]  as numbers; -1 where a key may not be drawn
    counts: Tensor  # int32 [rows, kv_heads, 4, 256]  by their exponents, at the first level
    listed: Tensor  # int32 [rows, kv_heads]  how many keys are worth reading
    worthy: Tensor  # float32 [rows, kv_heads, keys]  their shares, in any order


def rank(found: Masses, norm: Tensor, policy: Dynamic, *, listed: bool) -> Ranked:
    """Rank the keys that may be drawn, and where `listed` list the shares of those worth reading.

    A priority is not negative, so its bits order as it does.
    """
    rows, kv_heads, group, keys = found.scores.shape
    lines, blocks = rows * kv_heads, max(1, -(-keys // BLOCK))
    splits = splits_for(lines, blocks)
    bits = torch.empty(rows, kv_heads, keys, dtype=torch.int32, device=norm.device)
    counts = bits.new_zeros(rows, kv_heads, LEVELS, 256)
    number = bits.new_zeros(rows, kv_heads) if listed else bits
    worthy = torch.empty_like(found.scores[:, :, 0]) if listed else norm
    _rank[lines, splits](
        found.scores, norm, found.starts, found.stops, found.lengths, bits, counts, number, worthy,
        kv_heads, keys, found.first, policy.sinks, float(policy.worth), -(-blocks // splits),
        GROUP=group, SAMPLED=policy.sampled, LISTED=listed, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return Ranked(bits, counts, number, worthy)


@triton.jit(do_not_specialize=["keys", "pages", "first", "sinks", "max_keys", "fewest"])
def _total(
    scores, page_lse, near, starts, stops, lengths, norm, held, most,
    keys, pages, first, sinks, max_keys, fewest,
    GROUP: tl.constexpr, NEAR: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and KV head."""
    row = tl.program_id(0).to(tl.int64)
    line = row * tl.num_programs(1) + tl.program_id(1)
    start, stop, length = edges(starts, stops, lengths, row)
    certain, free, seen = amounts(start, stop, length, sinks)
    column, late, key = tl.arange(0, BLOCK), tl.arange(0, NEAR), tl.arange(0, PAGE)
    sink = (first + key >= start) & (first + key < tl.minimum(stop, sinks))
    share = 0.0
    for head in range(GROUP):
        place = line * GROUP + head
        last = tl.load(near + place * NEAR + late)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for block in range(0, pages, BLOCK):
            page = block + column
            lse = tl.load(page_lse + place * pages + page, page < pages, float("-inf"))
            top = tl.maximum(top, lse)
        peak = tl.maximum(tl.max(top, 0), tl.max(last, 0))
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.zeros((BLOCK,), tl.float32)
        for block in range(0, pages, BLOCK):
            page = block + column
            lse = tl.load(page_lse + place * pages + page, page < pages, float("-inf"))
            mass += tl.exp(lse - peak)
        whole = peak + tl.log(tl.sum(mass, 0) + tl.sum(tl.exp(last - peak), 0))
        tl.store(norm + place, whole)
        first_scores = tl.load(scores + place * keys + key, sink, float("-inf"))
        share += tl.sum(tl.exp(last - whole), 0) + tl.sum(tl.exp(first_scores - whole), 0)
    tl.store(held + line, share / GROUP)
    room = tl.maximum(max_keys - certain - seen, fewest)
    tl.store(most + line, tl.minimum(room, free))


@triton.jit
def number(position, kv_head):
    """`kernels.sample.uniform`: products wrap around as there."""
    mixed = position * KEY_STEP + kv_head * HEAD_STEP
    return (((mixed >> DROPPED) & KEPT).to(tl.float32) + 0.5) * FINE


@triton.jit(do_not_specialize=["kv_heads", "keys", "first", "sinks", "blocks"])
def _rank(
    scores, norm, starts, stops, lengths, bits, counts, listed, worthy,
    kv_heads, keys, first, sinks, worth, blocks,
    GROUP: tl.constexpr, SAMPLED: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A split of the keys of a row and KV head."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, (line % kv_heads).to(tl.int32)
    start, stop, length = edges(starts, stops, lengths, row)
    least = worth / (length - start).to(tl.float32)
    keys = tl.multiple_of(keys, PAGE)
    amount = tl.zeros((256,), tl.int32)
    low = split * blocks * BLOCK
    end = tl.minimum(tl.minimum(low + blocks * BLOCK, keys), stop - first)
    for block in range(low, end, BLOCK):
        key = block + tl.arange(0, BLOCK)
        there = key < end
        share = tl.zeros((BLOCK,), tl.float32)
        for head in tl.static_range(GROUP):
            score = tl.load(scores + (line * GROUP + head) * keys + key, there, float("-inf"))
            share += tl.exp(score - tl.load(norm + line * GROUP + head))
        share = share / GROUP
        position = first + key
        may = there & (position >= start) & (position >= sinks)
        priority = share
        if SAMPLED:
            priority = tl.div_rn(share, number(position, kv_head))
        # What is not a number counts as the greatest.
        order = tl.where(priority == priority, priority.to(tl.int32, bitcast=True), 0x7F800000)
        tl.store(bits + line * keys + key, tl.where(may, order, -1), there)
        amount += tl.histogram((order >> 23) & 255, 256, may)
        if LISTED:
            worth_it = (may & (share >= least)).to(tl.int32)
            some = tl.sum(worth_it, 0)
            if some > 0:
                place = tl.atomic_add(listed + line, some) + tl.cumsum(worth_it, 0) - 1
                tl.store(worthy + line * keys + place, share, worth_it > 0)
    tl.atomic_add(counts + line * 1024 + tl.arange(0, 256), amount, amount > 0)
