"""The greatest of many numbers, and the budget of a row (`kernels.budget`), without a sort.

Shares and priorities are not negative, so their bits order as they do, and counting keys by their
bits, eleven at a time, names the least that is chosen. What is not a number counts as infinite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kernels.budget import SAMPLE
from kernels.cpu.launch import jit
from kernels.cpu.number import bits, long_vectors, number_of_bits

BINS = 2048
_FIRST, _SECOND = 20, 9  # bits behind the first eleven, and behind the next


class Budget(NamedTuple):
    """What a kernel needs of `kernels.policy.Dynamic`."""

    coverage: float
    worth: float
    min_keys: int
    max_keys: int
    sinks: int
    sampled: bool


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
        How many there are, and the bits of the greatest that is not among them; 0 without one.
    """
    if wanted >= high - low:
        for key in range(low, high):
            named[key - low] = key
        return max(high - low, 0), np.int32(0)
    if wanted <= 0:
        return 0, np.int32(0)
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
    least = np.int32(digit << _FIRST)
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
    above = 0
    for place in range(found):
        key = named[place]
        value = rank[key]
        equal = value == least
        named[above] = key
        above += (value > least) | (equal & (wanted > 0))
        wanted -= equal
    return above, least if wanted < 0 else _greatest_below(rank[low:high], least)


@jit
def _greatest_below(rank: Any, least: Any) -> Any:
    long_vectors()
    most = np.int32(0)
    for key in range(rank.shape[0]):
        value = rank[key]
        value = value if value < least else np.int32(0)
        most = value if value > most else most
    return most


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
    share: Any, low: int, high: int, held: Any, always: int, visible: int, budget: Budget, few: Any
) -> Any:
    """How many keys from `low` to `high` the budget buys; `kernels.reference.wanted_keys`.

    Args:
        share: int32 [keys], bits of their shares of a row's mass.
        low: first key.
        high: the one behind the last.
        held: share of the keys that are always read.
        always: how many these are.
        visible: keys that the row sees.
        budget: the bounds.
        few: int32 [keys], of any content.
    """
    needed = 0
    if budget.min_keys < budget.max_keys:
        least = bits(np.float32(budget.worth / visible))
        worthy = 0
        for key in range(low, high):
            few[worthy] = share[key]
            worthy += share[key] >= least
        needed = _reach(few, worthy, np.float64(held), budget.coverage)
    wanted = min(max(needed, budget.min_keys - always), budget.max_keys - always)
    if budget.sampled:
        wanted = max(wanted, SAMPLE)
    return max(min(wanted, high - low), 0)


@jit
def _reach(few: Any, found: int, held: Any, coverage: Any) -> Any:
    """How many of the greatest of `found` shares reach the coverage with what is held, or all."""
    if held >= coverage:
        return 0
    counts, masses = np.empty(BINS, np.int32), np.empty(BINS, np.float64)
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
