"""Products with rows of numbers, and what becomes of scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cpu.launch import jit
from kernels.cpu.number import exp, long_vectors, number, of_order, order, prefetch_row

AHEAD = 12
"""Rows that are asked for before they are needed."""
_ZERO, _LEAST = np.float32(0), np.int32(-(2**31))


@jit
def add_rows(weight: Any, rows: Any, place: Any, total: Any) -> None:
    """Add `rows` [.., head_dim] at `place` [n], times `weight` [n], to `total` [head_dim]."""
    long_vectors()
    many = place.shape[0]
    index = 0
    while index + 4 <= many:  # so that totals are loaded and stored less often
        a, b, c, d = weight[index], weight[index + 1], weight[index + 2], weight[index + 3]
        one, two, three, four = place[index], place[index + 1], place[index + 2], place[index + 3]
        for channel in range(total.shape[0]):
            left = a * number(rows[one, channel]) + b * number(rows[two, channel])
            right = c * number(rows[three, channel]) + d * number(rows[four, channel])
            total[channel] += left + right
        index += 4
    while index < many:
        one = place[index]
        for channel in range(total.shape[0]):
            total[channel] += weight[index] * number(rows[one, channel])
        index += 1


@jit
def dot_rows(query: Any, rows: Any, place: Any, out: Any, offset: int) -> None:
    """Products of queries and rows.

    Args:
        query: float32 [group, head_dim].
        rows: [.., head_dim].
        place: int64 [n], which rows.
        out: float32 [group, ..], out: from `offset` on.
        offset: see there.
    """
    long_vectors()
    group, head_dim = query.shape
    for index in range(min(AHEAD, place.shape[0])):
        prefetch_row(rows, place[index])
    for index in range(place.shape[0]):
        row = place[index]
        if index + AHEAD < place.shape[0]:
            prefetch_row(rows, place[index + AHEAD])
        head = 0
        while head + 4 <= group:
            one, two, three, four = _ZERO, _ZERO, _ZERO, _ZERO
            for channel in range(head_dim):
                value = number(rows[row, channel])
                one += query[head, channel] * value
                two += query[head + 1, channel] * value
                three += query[head + 2, channel] * value
                four += query[head + 3, channel] * value
            out[head, offset + index] = one
            out[head + 1, offset + index] = two
            out[head + 2, offset + index] = three
            out[head + 3, offset + index] = four
            head += 4
        while head + 2 <= group:
            one, two = _ZERO, _ZERO
            for channel in range(head_dim):
                value = number(rows[row, channel])
                one += query[head, channel] * value
                two += query[head + 1, channel] * value
            out[head, offset + index] = one
            out[head + 1, offset + index] = two
            head += 2
        if head < group:
            one = _ZERO
            for channel in range(head_dim):
                one += query[head, channel] * number(rows[row, channel])
            out[head, offset + index] = one


@jit
def greatest_score(scores: Any) -> Any:
    """The greatest of `scores` [keys]; 0 where there is none above -inf."""
    long_vectors()
    most = _LEAST
    for key in range(scores.shape[0]):
        place = order(scores[key])
        most = place if place > most else most
    peak = of_order(most)
    return _ZERO if scores.shape[0] == 0 or peak == -np.inf else peak


@jit
def exponentials(scores: Any, peak: Any) -> Any:
    """`scores` [keys] to e ** (score - peak), in place; gives their sum."""
    long_vectors()
    total = _ZERO
    for key in range(scores.shape[0]):
        value = exp(scores[key] - peak)
        scores[key] = value
        total += value
    return total


@jit
def total_of(numbers: Any) -> Any:
    """The sum of `numbers` [n]."""
    long_vectors()
    total = _ZERO
    for place in range(numbers.shape[0]):
        total += numbers[place]
    return total


@jit
def log_sum(scores: Any) -> Any:
    """The log-sum-exp of `scores` [keys]."""
    long_vectors()
    most, total = greatest_score(scores), np.float32(0)
    for place in range(scores.shape[0]):
        total += exp(scores[place] - most)
    return np.log(total) + most
