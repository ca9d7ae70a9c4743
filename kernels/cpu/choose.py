"""The choice of one row and KV head, once the masses of all its keys are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.candidates import returned, share_bits, slots_of, take
from kernels.cpu.cut import BINS, Budget, greatest, spend
from kernels.cpu.launch import jit
from kernels.cpu.number import exp, number_of_bits
from kernels.cpu.scan import BLOCK, add_rows, dot_rows, exponentials, greatest_score

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place

_ZERO, _ONE, _INFINITE = np.float32(0), np.float32(1), np.int32(0x7F800000)


@jit
def score_near(keys: Keys, place: Place, query: Any) -> Any:
    """Exact scores of the recent keys: float32 [group, recent]."""
    near = np.empty((query.shape[0], place.length - place.since), np.float32)
    positions = np.arange(place.since, place.length)
    slots = slots_of(keys, place.head, place.row, 0, positions)
    dot_rows(query, keys.kv, slots * 2, near, 0)
    return near


@jit
def unite(near: Any, peak: Any, top: Any, factor: Any, share: Any, weight: Any) -> None:
    """Every head's masses in one unit.

    Args:
        near: float32 [group, recent], exact scores; out: their masses.
        peak: float32 [2, group, blocks], see `scan`.
        top: float32 [group], out: the unit is e ** top.
        factor: float32 [group, blocks], out: the blocks' units.
        share: float32 [group], out: the unit's share of a head's mass, over the number of heads.
        weight: float32 [group, blocks], out: likewise of the blocks' units.
    """
    group, blocks = factor.shape
    for reader in range(group):
        most = greatest_score(near[reader])
        for block in range(blocks):
            most = max(most, peak[0, reader, block])
        total = exponentials(near[reader], most)
        for block in range(blocks):
            factor[reader, block] = exp(peak[0, reader, block] - most)
            total += peak[1, reader, block] * factor[reader, block]
        top[reader] = most
        share[reader] = _ONE / (total * np.float32(group))
        for block in range(blocks):
            weight[reader, block] = factor[reader, block] * share[reader]


@jit
def choose_of_all(
    place: Place, budget: Budget, rank: Any, near: Any, mass: Any, top: Any, factor: Any,
    share: Any, left: Any, indices: Any, rest: Any,
) -> Any:  # fmt: skip
    """Choose where every key's mass is exact.

    Args:
        place: see there.
        budget: see there.
        rank: int32 [keys], bits of the keys' shares.
        near: float32 [group, recent], masses.
        mass: float32 [group, keys]; of what is chosen, 0 is left.
        top: see `unite`.
        factor: likewise.
        share: likewise.
        left: float32 [group, pages], out: the mass left out.
        indices: int64 [capacity], out.
        rest: float32 [group], out: the log of the mass left out.

    Returns:
        How many keys are chosen.
    """
    named, bins = np.empty(place.coded + 1, np.int32), np.empty((2, BINS), np.int32)
    sinks = min(max(budget.sinks - place.first * 64, place.low), place.coded)
    held = sum_shares(near, share)
    for key in range(place.low, sinks):
        held += number_of_bits(rank[key])
    always, visible = sinks - place.low + near.shape[1], place.length - place.start
    wanted = spend(rank, sinks, place.coded, held, always, visible, budget, named)
    chosen, _ = greatest(rank, sinks, place.coded, wanted, bins, named)
    for reader in range(mass.shape[0]):
        for key in range(place.low, sinks):
            mass[reader, key] = _ZERO
        for number in range(chosen):
            mass[reader, named[number]] = _ZERO
    sum_pages(mass, factor, left)
    for reader in range(mass.shape[0]):
        rest[reader] = np.log(total_of(left[reader])) + top[reader]
    total = 0
    for key in range(place.low, sinks):
        indices[total] = place.first * 64 + key
        total += 1
    for number in range(chosen):
        indices[total] = place.first * 64 + named[number]
        total += 1
    return total


@jit
def choose_of_likely(
    keys: Keys, place: Place, query: Any, budget: Budget, rank: Any, near: Any, mass: Any, top: Any,
    factor: Any, share: Any, left: Any, indices: Any, rest: Any,
) -> Any:  # fmt: skip
    """Choose where masses are estimates: as `choose_of_all`, of the candidates; `near` is scores.

    `query` is float32 [group, head_dim], scaled; what is not described here is as there.
    """
    group, first = query.shape[0], place.first * 64
    named, bins = np.empty(place.coded + 1, np.int32), np.empty((2, BINS), np.int32)
    for key in range(place.low, min(budget.sinks - first, place.coded)):
        rank[key] = _INFINITE
    many, least = greatest(rank, place.low, place.coded, budget.candidates, bins, named)
    likely = named[:many]
    own, scores = np.empty((group, many), np.float32), np.empty((group, many), np.float32)
    take(mass, factor, likely, own)
    sum_pages(mass, factor, left)
    slots = slots_of(keys, place.head, place.row, place.first, likely)
    dot_rows(query, keys.kv, slots * 2, scores, 0)
    back, outer = np.zeros(group, np.float32), np.empty(group, np.float32)
    if least >= 0:
        returned(keys, slots, query, share, least, own, back)
    part = np.zeros(many, np.float32)
    for reader in range(group):
        others = np.log(total_of(left[reader]) + back[reader]) + top[reader]
        most = max(greatest_score(near[reader]), others)
        if many > 0:
            most = max(most, greatest_score(scores[reader]))
        outer[reader] = exp(others - most)
        total = outer[reader] + exponentials(scores[reader], most)
        total += exponentials(near[reader], most)
        top[reader] = most
        share[reader] = _ONE / (total * np.float32(group))
        for number in range(many):
            part[number] += scores[reader, number] * share[reader]
    held = sum_shares(near, share)
    share_bits(part, rank[:many])
    sinks = 0
    while sinks < many and first + likely[sinks] < budget.sinks:
        held += part[sinks]
        sinks += 1
    always, visible = sinks + near.shape[1], place.length - place.start
    few = np.empty(many + 1, np.int32)
    wanted = spend(rank, sinks, many, held, always, visible, budget, few)
    chosen, _ = greatest(rank, sinks, many, wanted, bins, few)
    for reader in range(group):
        for number in range(sinks):
            scores[reader, number] = _ZERO
            own[reader, number] = _ZERO
        for number in range(chosen):
            scores[reader, few[number]] = _ZERO
            own[reader, few[number]] = _ZERO
        rest[reader] = np.log(total_of(scores[reader]) + outer[reader]) + top[reader]
        for number in range(many):
            key = likely[number]
            left[reader, key >> 6] += own[reader, number]
            unit = factor[reader, key // (BLOCK * 64)]
            mass[reader, key] = own[reader, number] / unit if unit > 0 else _ZERO
    for number in range(sinks):
        indices[number] = first + likely[number]
    for number in range(chosen):
        indices[sinks + number] = first + likely[few[number]]
    return sinks + chosen


@jit
def mean_left(keys: Keys, place: Place, left: Any, unit: Any, mean: Any) -> None:
    """Means of the pages' values.

    Args:
        keys: the cache.
        place: the row and KV head.
        left: float32 [group, pages], their weights; out: shares of their sum.
        unit: float32 [group], out: a unit's share of it.
        mean: float32 [group, head_dim], out.
    """
    group, pages = left.shape
    cached = np.empty(pages, np.int64)
    for page in range(pages):
        table = keys.tables[place.row // keys.queries]
        cached[page] = table[place.first + page] + place.head * keys.pages
    for reader in range(group):
        unit[reader] = part = _ONE / max(total_of(left[reader]), np.float32(1e-30))
        for page in range(pages):
            left[reader, page] *= part
        for channel in range(mean.shape[1]):
            mean[reader, channel] = _ZERO
        add_rows(left[reader], keys.value_mean, cached, mean[reader])


@jit
def total_of(numbers: Any) -> Any:
    """The sum of `numbers` [n]."""
    total = _ZERO
    for place in range(numbers.shape[0]):
        total += numbers[place]
    return total


@jit
def sum_shares(mass: Any, share: Any) -> Any:
    """The share of the keys in `mass` [group, keys], a head's unit being `share` [group]."""
    total = _ZERO
    for reader in range(mass.shape[0]):
        total += total_of(mass[reader]) * share[reader]
    return total


@jit
def sum_pages(mass: Any, factor: Any, left: Any) -> None:
    """The masses [group, keys] by page, to `left` [group, pages]."""
    for reader in range(left.shape[0]):
        for page in range(left.shape[1]):
            total, keys = _ZERO, mass[reader, page * 64 : page * 64 + 64]
            for key in range(64):
                total += keys[key]
            left[reader, page] = total * factor[reader, page // BLOCK]
