"""How much mass a row's keys have, and how many marks are put on its line (`kernels.budget`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels.budget import SAMPLE
from kernels.codes import FOURS
from kernels.cpu.launch import jit
from kernels.cpu.number import long_vectors
from kernels.cpu.vectors import exponentials, greatest_score, total_of

if TYPE_CHECKING:
    from kernels.cpu.keys import Place

_ZERO, _ONE = np.float32(0), np.float32(1)


class Budget(NamedTuple):
    """What a kernel needs of `kernels.policy.Dynamic`."""

    coverage: float
    worth: float
    min_keys: int
    max_keys: int
    sinks: int


@jit
def spend(place: Place, budget: Budget, score: Any, probes: int, always: int, norm: Any) -> int:
    """The norm of a row's masses, and how many marks it gets.

    Args:
        place: see there.
        budget: see there.
        score: float32 [group, ..], of probed and of kept keys; of any content afterwards.
        probes: how many are probed.
        always: how many are kept.
        norm: float32 [group], out: log of the whole mass.

    Returns:
        The number of marks: 0 where no share is known, since the mass is not finite; as many as
        there are free keys, or more, where all of them are read.
    """
    share, held, lost = np.zeros(probes, np.float32), _ZERO, False
    each = np.float32(place.apart * FOURS)
    for head in range(score.shape[0]):
        own = score[head, : probes + always]
        most = greatest_score(own)
        total = exponentials(own, most)
        norm[head] = np.log(total) + most
        # Not np.isfinite: it subtracts, and reordered sums make 0 of that.
        lost |= not abs(norm[head]) < np.inf
        part = _ONE / (total * np.float32(score.shape[0]))
        held += total_of(own[probes:]) * part
        for probe in range(probes):
            share[probe] += own[probe] * (part / each)
    free = place.coded - place.low
    most_marks = max(budget.max_keys - always, SAMPLE)
    number = min(max(budget.min_keys - always, SAMPLE), most_marks)
    if lost:
        return most_marks if most_marks >= free else 0
    keys, mass = _expected(share, held, number, each)
    worth = np.float32(budget.worth / (place.length - place.start))
    while number < min(most_marks, free) and mass < np.float32(budget.coverage):
        more = min(2 * number, most_marks)
        keys_of_more, mass_of_more = _expected(share, held, more, each)
        if mass_of_more - mass < worth * (keys_of_more - keys):
            break
        number, keys, mass = more, keys_of_more, mass_of_more
    return number


@jit
def _expected(share: Any, held: Any, number: int, each: Any) -> Any:
    """How many keys `number` marks meet, and the share of the mass on them and the held keys."""
    long_vectors()
    keys, mass, marks = _ZERO, _ZERO, np.float32(number)
    for probe in range(share.shape[0]):
        met = share[probe] * marks
        met = met if met < _ONE else _ONE
        keys += met
        mass += share[probe] * met
    return each * keys, held + each * mass
