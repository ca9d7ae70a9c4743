"""The budget, spent on scored candidates: `kernels.budget` in one program a row and KV head.

The least share that is chosen is found by bisection of its bits, once by the mass of the keys above
it and once by their number: sums of shares, and no sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.page import PAGE
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import Rows
    from kernels.policy import Dynamic

MOST = 1 << 15
"""Most candidates that one program can hold."""
NEAR = 2 * PAGE
"""Keys of the recent window, those included that are not written yet."""


def cut(
    scores: Tensor, positions: Tensor | None, first: int, near: Tensor, others: Tensor,
    rows: Rows, policy: Dynamic,
) -> tuple[Selection, Tensor]:  # fmt: skip
    """Choose keys between the policy's bounds.

    Args:
        scores: float32 [rows, kv_heads, group, candidates] in front of the recent window, -inf
            where there is none.
        positions: int64 [rows, kv_heads, candidates], ascending, -1 behind the last; None for
            consecutive positions from `first` on.
        first: see there.
        near: float32 [rows, kv_heads, group, 128], scores of the recent window, -inf where a row
            does not see a key.
        others: float32 [rows, kv_heads, group], log of the mass of keys that are no candidates.
        rows: where each row's keys lie.
        policy: the bounds.

    Returns:
        The selection, and float32 [rows, kv_heads, group], the log of the mass left out.
    """
    count, kv_heads, group, candidates = scores.shape
    capacity = min(max(policy.max_keys, NEAR + policy.sinks), candidates + NEAR)
    indices = torch.full((count, kv_heads, capacity), -1, dtype=torch.int64, device=scores.device)
    counts = torch.empty(count, kv_heads, dtype=torch.int64, device=scores.device)
    rest = torch.empty(count, kv_heads, group, device=scores.device)
    size = triton.next_power_of_2(max(candidates, 16))
    _cut[count, kv_heads](
        scores, rows.starts if positions is None else positions, near, others,
        rows.recent_page, rows.visible, indices, counts, rest,
        candidates, capacity, first, policy.coverage, policy.worth,
        policy.min_keys, policy.max_keys, policy.sinks,
        GROUP=group, SIZE=size, NEAR=NEAR, PAGE=PAGE, LISTED=positions is not None,
        num_warps=4 if size <= 2048 else 8 if size <= 8192 else 16,
    )  # fmt: skip
    return Selection(indices, counts), rest


@triton.jit(do_not_specialize=["candidates", "capacity", "first", "min_keys", "max_keys", "sinks"])
def _cut(
    scores, positions, near, others, recent_pages, visibles, indices, counts, rest,
    candidates, capacity, first, coverage, worth,
    min_keys, max_keys, sinks,
    GROUP: tl.constexpr, SIZE: tl.constexpr, NEAR: tl.constexpr, PAGE: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """One row and KV head."""
    row = tl.program_id(0).to(tl.int64)
    line = row * tl.num_programs(1) + tl.program_id(1)
    key, late = tl.arange(0, SIZE), tl.arange(0, NEAR)
    inside = key < candidates
    share = tl.zeros((SIZE,), tl.float32)
    late_share = tl.zeros((NEAR,), tl.float32)
    there = inside
    for head in tl.static_range(GROUP):
        place = line * GROUP + head
        score = tl.load(scores + place * candidates + key, inside, float("-inf"))
        last = tl.load(near + place * NEAR + late)
        other = tl.load(others + place)
        peak = tl.maximum(tl.maximum(tl.max(score, 0), tl.max(last, 0)), other)
        mass, late_mass = tl.exp(score - peak), tl.exp(last - peak)
        weight = 1 / (tl.sum(mass, 0) + tl.sum(late_mass, 0) + tl.exp(other - peak)) / GROUP
        share += mass * weight
        late_share += late_mass * weight
        if head == 0:
            # A score that is not a number is of a key that is there.
            there = inside & (score != float("-inf"))
            late_there = last != float("-inf")
    position = first + key.to(tl.int64)
    if LISTED:
        position = tl.load(positions + line * candidates + key, inside, -1)
        there = inside & (position >= 0)
    kept = there & (position < sinks)
    free = there & (position >= sinks)
    always = tl.sum(kept.to(tl.int32), 0) + tl.sum(late_there.to(tl.int32), 0)
    held = tl.sum(tl.where(kept, share, 0.0), 0) + tl.sum(late_share, 0)
    share = tl.where(free, share, 0.0)
    # A share that is not a number counts as the greatest that there can be.
    bits = tl.where(free, tl.minimum(share.to(tl.int32, bitcast=True), 0x7F800000), -1)
    # The least share with which the mass is reached: the greatest, so that it still is.
    low, high = 0, 0x7F800000
    for _ in range(31):
        middle = low + (high - low) // 2
        reached = held + tl.sum(tl.where(bits >= middle, share, 0.0), 0) >= coverage
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    above = bits > low
    missing = coverage - held - tl.sum(tl.where(above, share, 0.0), 0)
    least = tl.cast(low, tl.float32, bitcast=True)
    needed = tl.sum(above.to(tl.int32), 0)
    needed += tl.where(
        (missing > 0) & (least > 0), tl.ceil(tl.minimum(missing / least, SIZE)), 0.0
    ).to(tl.int32)
    reachable = held + tl.sum(share, 0) >= coverage
    needed = tl.where(reachable, needed, SIZE)
    needed = tl.where(held >= coverage, 0, needed)
    worthy = share >= worth / tl.load(visibles + row).to(tl.float32)
    needed = tl.minimum(needed, tl.sum((worthy & free).to(tl.int32), 0))
    wanted = tl.minimum(tl.maximum(needed, min_keys - always), max_keys - always)
    wanted = tl.maximum(tl.minimum(wanted, tl.sum(free.to(tl.int32), 0)), 0)
    # The least share with which so many are chosen.
    low, high = -1, 0x7F800000  # of those above `low` at least as many, above `high` fewer
    for _ in range(32):
        middle = low + (high - low) // 2
        enough = tl.sum((bits > middle).to(tl.int32), 0) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    above = bits > high
    level = ((bits == high) & free).to(tl.int32)
    room = wanted - tl.sum(above.to(tl.int32), 0)
    chosen = kept | above | ((level > 0) & (tl.cumsum(level, 0) <= room))
    chosen = tl.where(wanted > 0, chosen.to(tl.int32), kept.to(tl.int32))
    target = indices + line * capacity
    tl.store(target + tl.cumsum(chosen, 0) - 1, position, chosen > 0)
    number = tl.sum(chosen, 0)
    newer = late_there.to(tl.int32)
    recent = tl.load(recent_pages + row) * PAGE + late
    tl.store(target + number + tl.cumsum(newer, 0) - 1, recent, late_there)
    tl.store(counts + line, (number + tl.sum(newer, 0)).to(tl.int64))
    for head in tl.static_range(GROUP):
        place = line * GROUP + head
        score = tl.load(scores + place * candidates + key, inside, float("-inf"))
        other = tl.load(others + place)
        left = tl.where(chosen > 0, float("-inf"), score)
        peak = tl.maximum(tl.max(left, 0), other)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(tl.exp(left - peak), 0) + tl.exp(other - peak)
        tl.store(rest + place, peak + tl.log(mass))
