"""The choice of one row and KV head, once the masses of all its keys are estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.cut import BINS, Budget, greatest, spend
from kernels.cpu.keys import slots_of
from kernels.cpu.launch import jit
from kernels.cpu.number import exp, long_vectors, number_of_bits
from kernels.cpu.sample import rank_keys
from kernels.cpu.scan import BLOCK, dot_rows, exponentials, greatest_score

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place

_ZERO, _ONE = np.float32(0), np.float32(1)


@jit
def score_near(keys: Keys, place: Place, query: Any) -> Any:
    """Exact scores of the recent keys: float32 [group, recent]."""
    near = np.empty((query.shape[0], place.length - place.since), np.float32)
    slots = slots_of(keys, place.head, place.row, np.arange(place.since, place.length))
    dot_rows(query, keys.kv, slots * 2, near, 0)
    return near


@jit
def unite(near: Any, peak: Any, factor: Any, unit: Any) -> None:
    """Every head's masses as shares of its whole mass.

    Args:
        near: float32 [group, recent], exact scores; out: their shares.
        peak: float32 [2, group, blocks], see `scan`.
        factor: float32 [group, blocks], out: the blocks' units, as shares.
        unit: float32 [group], out: the log of the whole mass.
    """
    for reader in range(near.shape[0]):
        most = greatest_score(near[reader])
        for block in range(factor.shape[1]):
            most = max(most, peak[0, reader, block])
        total = exponentials(near[reader], most)
        for block in range(factor.shape[1]):
            factor[reader, block] = exp(peak[0, reader, block] - most)
            total += peak[1, reader, block] * factor[reader, block]
        unit[reader] = np.log(total) + most
        part = _ONE / total
        for block in range(factor.shape[1]):
            factor[reader, block] *= part
        for key in range(near.shape[1]):
            near[reader, key] *= part


@jit
def choose(
    place: Place, budget: Budget, near: Any, mass: Any, factor: Any, indices: Any, log_weight: Any
) -> Any:
    """Choose keys, and take what they stand for off the masses.

    Args:
        place: see there.
        budget: see there.
        near: float32 [group, recent], shares.
        mass: float32 [group, keys], in units of its block; of what is chosen, what it does not
            stand for is left: nothing, or less.
        factor: see `unite`.
        indices: int64 [capacity], out: positions, -1 behind.
        log_weight: float32 [capacity], out, where keys are drawn: log of what each stands for.

    Returns:
        How many keys are chosen.
    """
    share, rank = np.empty(place.coded, np.int32), np.empty(place.coded, np.int32)
    named, bins = np.empty(place.coded + 1, np.int32), np.empty((2, BINS), np.int32)
    first = place.first * 64
    rank_keys(mass, factor, place.head, first, budget.sampled, share, rank)
    sinks = min(max(budget.sinks - first, place.low), place.coded)
    held = _ZERO
    for reader in range(near.shape[0]):
        held += total_of(near[reader])
    held /= np.float32(near.shape[0])
    for key in range(place.low, sinks):
        held += number_of_bits(share[key])
    always, visible = sinks - place.low + near.shape[1], place.length - place.start
    wanted = spend(share, sinks, place.coded, held, always, visible, budget, named)
    drawn, level = greatest(rank, sinks, place.coded, wanted, bins, named)
    threshold = number_of_bits(level)
    log_weight[:] = _ZERO
    total = 0
    for key in range(place.low, sinks):
        indices[total] = first + key
        total += 1
        for reader in range(mass.shape[0]):
            mass[reader, key] = _ZERO
    for number in range(drawn):
        key, less = named[number], _ZERO
        own = number_of_bits(share[key])
        if budget.sampled and own < threshold:
            stands = threshold / own
            log_weight[total] = np.log(stands)
            less = _ONE - stands
        for reader in range(mass.shape[0]):
            mass[reader, key] *= less
        indices[total] = first + key
        total += 1
    for position in range(place.since, place.length):
        indices[total] = position
        total += 1
    for empty in range(total, indices.shape[0]):
        indices[empty] = -1
    return total


@jit
def share_left(place: Place, mass: Any, factor: Any, reader: int) -> Any:
    """What is left of the masses, as a share of a head's whole mass."""
    total, size = _ZERO, BLOCK * 64
    for block in range(factor.shape[1]):
        own = mass[reader, block * size : min((block + 1) * size, place.coded)]
        total += total_of(own) * factor[reader, block]
    return total


@jit
def total_of(numbers: Any) -> Any:
    """The sum of `numbers` [n]."""
    long_vectors()
    total = _ZERO
    for place in range(numbers.shape[0]):
        total += numbers[place]
    return total
