"""The greatest of many shares, and the budget spent on them (`kernels.budget`), without a sort.

Shares are not negative, so their bits order as they do, and counting keys by their bits, eleven at
a time, names the least share that is chosen. A share that is not a number counts as infinite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kernels.cpu.launch import jit
from kernels.cpu.number import number_of_bits

BINS = 2048
_FIRST, _SECOND = 20, 9  # bits behind the first eleven, and behind the next


class Budget(NamedTuple):
    """What a kernel needs of `kernels.policy.Dynamic`."""

    coverage: float
    worth: float
    min_keys: int
    max_keys: int
    sinks: int
    candidates: int
    remainder: bool
    draws: int


@jit
def greatest(rank: Any, low: int, high: int, wanted: int, bins: Any, named: Any) -> Any:
    """The `wanted` greatest of `rank` from `low` to `high`; of equals the first.

    Args:
        rank: int32 [keys], bits of numbers that are not negative.
        low: first key.
        high: the one behind the last.
        wanted: how many.
        bins: int32 [2, 2048], of any content.
        named: int32 [keys + 1], out: the keys, ascending.

    Returns:
        How many there are, and the least one's bits; -1 where all are wanted.
    """
    if wanted >= high - low:
        for key in range(low, high):
            named[key - low] = key
        return max(high - low, 0), np.int32(-1)
    if wanted <= 0:
        return 0, np.int32(0x7FFFFFFF)
    even, odd = bins[0], bins[1]  # two counters, or each would wait for the one before
    even[:] = 0
    odd[:] = 0
    key = low
    while key + 2 <= high:
        even[rank[key] >> _FIRST] += 1
        odd[rank[key + 1] >> _FIRST] += 1
        key += 2
    if key < high:
        even[rank[key] >> _FIRST] += 1
    for digit in range(BINS):
        even[digit] += odd[digit]
    digit, wanted = _descend(even, wanted)
    least, above = np.int32(digit << _FIRST), 0
    found = 0
    for key in range(low, high):
        named[found] = key
        found += rank[key] >= least
    for shift, width in ((_SECOND, 11), (0, 9)):
        even[:] = 0
        for place in range(found):
            offset = rank[named[place]] - least
            if 0 <= offset < (1 << (width + shift)):
                even[offset >> shift] += 1
        digit, wanted = _descend(even, wanted)
        least = np.int32(least + (digit << shift))
    for place in range(found):
        key = named[place]
        value = rank[key]
        equal = value == least
        named[above] = key
        above += (value > least) | (equal & (wanted > 0))
        wanted -= equal
    return above, least


@jit
def _descend(counts: Any, wanted: int) -> Any:
    """The bin that holds the `wanted`-th greatest, and how many are wanted of its own."""
    digit = BINS - 1
    while digit > 0 and counts[digit] < wanted:
        wanted -= counts[digit]
        digit -= 1
    return digit, wanted


@jit
def spend(
    rank: Any, low: int, high: int, held: Any, always: int, visible: int, budget: Budget, few: Any
) -> Any:
    """How many keys from `low` to `high` the budget buys; `kernels.reference.cut_by_mass`.

    Args:
        rank: int32 [keys], bits of their shares of a row's mass.
        low: first key.
        high: the one behind the last.
        held: share of the keys that are always kept.
        always: how many these are.
        visible: keys that the row sees.
        budget: the bounds.
        few: int32 [keys], of any content.
    """
    needed = 0
    if budget.min_keys < budget.max_keys:
        needed = _reach(rank, low, high, np.float64(held), budget.coverage, few)
        least = np.float32(budget.worth / visible)
        worthy = 0
        for key in range(low, high):
            worthy += number_of_bits(rank[key]) >= least
        needed = min(needed, worthy)
    wanted = min(max(needed, budget.min_keys - always), budget.max_keys - always)
    return max(min(wanted, high - low), 0)


@jit
def _reach(rank: Any, low: int, high: int, held: Any, coverage: Any, few: Any) -> Any:
    """How many of the greatest shares it takes, with what is held, to reach the coverage."""
    if held >= coverage:
        return 0
    counts, masses = np.empty(BINS, np.int32), np.empty(BINS, np.float64)
    found = high - low
    for key in range(low, high):
        few[key - low] = rank[key]
    needed = 0
    for shift, width in ((_FIRST, 11), (_SECOND, 11), (0, 9)):
        for digit in range(BINS):
            counts[digit] = 0
            masses[digit] = 0
        mask = (1 << width) - 1
        for place in range(found):
            digit = (few[place] >> shift) & mask
            counts[digit] += 1
            masses[digit] += number_of_bits(few[place])
        digit = BINS - 1
        while digit >= 0 and held + masses[digit] < coverage:
            held += masses[digit]
            needed += counts[digit]
            digit -= 1
        if digit < 0:
            return needed
        kept = 0
        for place in range(found):
            value = few[place]
            few[kept] = value
            kept += ((value >> shift) & mask) == digit
        found = kept
    for place in range(found):  # equals
        if held >= coverage:
            break
        held += number_of_bits(few[place])
        needed += 1
    return needed
