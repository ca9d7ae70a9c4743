"""The budget (`kernels.budget`) in one program a row and KV head, from the shares worth reading.

The least share with which the mass is reached is found by its bits, three at a time. Shares are
added as whole numbers: programs have listed them in any order. Few rows need it: seldom do the keys
that are worth reading carry the whole target, and then they are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.budget import SAMPLE
from kernels.gpu.spans import amounts, edges

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.gpu.masses import Masses
    from kernels.gpu.shares import Ranked, Totals
    from kernels.policy import Dynamic

BLOCK = 1024
"""Shares that a program reads at once."""
UNITS = tl.constexpr(2.0**40)
"""In the whole mass."""


def fewest(policy: Dynamic) -> int:
    """How many keys are drawn at least, where so many may be."""
    return SAMPLE if policy.sampled else 0


def varies(policy: Dynamic) -> bool:
    """Whether the number of keys depends on the keys."""
    return policy.min_keys < policy.max_keys and (policy.coverage < 1 or policy.worth > 0)


def spend(found: Masses, whole: Totals, ranked: Ranked, policy: Dynamic) -> Tensor:
    """How many keys each row and KV head draws: int32 [rows, kv_heads].

    Those that are worth reading must be listed in `ranked`.
    """
    rows, kv_heads, keys = ranked.bits.shape
    wanted = torch.empty_like(whole.most)
    _spend[rows, kv_heads](
        found.starts, found.stops, found.lengths, whole.held, whole.most, ranked.listed,
        ranked.worthy, wanted, keys, policy.sinks, policy.min_keys, fewest(policy),
        float(policy.coverage),
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return wanted


@triton.jit(do_not_specialize=["keys", "sinks", "min_keys", "fewest"])
def _spend(
    starts, stops, lengths, held, mosts, listed, worthy, wanted,
    keys, sinks, min_keys, fewest, coverage, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and KV head."""
    row = tl.program_id(0).to(tl.int64)
    line = row * tl.num_programs(1) + tl.program_id(1)
    start, stop, length = edges(starts, stops, lengths, row)
    certain, _free, seen = amounts(start, stop, length, sinks)
    most = tl.load(mosts + line)
    least = tl.minimum(tl.maximum(min_keys - certain - seen, fewest), most)
    count, had = tl.load(listed + line), tl.load(held + line)
    needed = tl.where(had < coverage, count, 0)
    shares = worthy + line * keys
    if (needed > least) & (least < most):
        target = ((coverage - had) * UNITS).to(tl.int64)
        column = tl.arange(0, BLOCK)
        greater, mass = _above(shares, count, -1, column, BLOCK)
        if mass >= target:
            step = tl.arange(0, 8)
            low = 0  # the greatest bits, so far, with which the mass is reached
            for turn in range(11):
                shift = tl.maximum(28 - 3 * turn, 0)
                bound = low + (step << shift)
                sums = tl.zeros((8, BLOCK), tl.int64)
                for block in range(0, count, BLOCK):
                    share = tl.load(shares + block + column, block + column < count, 0.0)
                    reached = share.to(tl.int32, bitcast=True)[None] >= bound[:, None]
                    sums += tl.where(reached, (share * UNITS).to(tl.int64)[None], 0)
                enough = (tl.sum(sums, 1) >= target).to(tl.int32)
                low += tl.maximum(tl.sum(enough, 0) - 1, 0) << shift
            greater, mass = _above(shares, count, low, column, BLOCK)
            one = (tl.cast(low, tl.float32, bitcast=True) * UNITS).to(tl.int64)
            one = tl.maximum(one, 1)
            level = (target - mass + one - 1) // one  # of the keys with just this share
            needed = tl.minimum(greater + level, count.to(tl.int64)).to(tl.int32)
    tl.store(wanted + line, tl.minimum(tl.maximum(needed, least), most))


@triton.jit
def _above(shares, count, low, column, BLOCK: tl.constexpr):
    """How many shares have greater bits than `low`, and their mass."""
    number = tl.zeros((BLOCK,), tl.int64)
    mass = tl.zeros((BLOCK,), tl.int64)
    for block in range(0, count, BLOCK):
        there = block + column < count
        share = tl.load(shares + block + column, there, 0.0)
        above = there & (share.to(tl.int32, bitcast=True) > low)
        number += above.to(tl.int64)
        mass += tl.where(above, (share * UNITS).to(tl.int64), 0)
    return tl.sum(number, 0), tl.sum(mass, 0)
