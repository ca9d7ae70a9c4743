"""Estimated masses of every key in front of a row's recent window.

From the keys' one-bit codes (`kernels.codes`), by counting bits: a query is rounded to 16 levels,
as RaBitQ does, so that its product with a row of signs is a sum of popcounts over its four bit
planes; that adds 3% to the variance of an estimate.

Keys are taken in blocks. A block's scores become e ** (score - peak), with the block's own peak,
while they are in the nearest cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.codes import NOISE
from kernels.cpu.launch import jit
from kernels.cpu.number import (
    exp,
    long_vectors,
    number,
    of_order,
    order,
    popcount,
    prefetch_row,
)

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place

BLOCK = 16
"""Pages whose scores share a peak: a fixed number, so that no result depends on the threads."""
AHEAD = 12
"""Rows that are asked for before they are needed."""
_ZERO, _ONE, _LEAST = np.float32(0), np.float32(1), np.int32(-(2**31))
_MIDDLE = np.float32(7.5)  # of the sixteen levels
_HALF_NOISE = np.float32(NOISE / 2)


@jit
def load_query(queries: Any, row: int, first: int, scale: Any, query: Any) -> None:
    """Heads from `first` on of `queries` [rows, heads, head_dim], scaled, to float32 `query`."""
    for head in range(query.shape[0]):
        for channel in range(query.shape[1]):
            query[head, channel] = number(queries[row, first + head, channel]) * scale


@jit
def level_query(query: Any, rotation: Any, planes: Any, level: Any) -> None:
    """The rotated query on a grid of sixteen levels, q = step (level - 7.5).

    Args:
        query: float32 [group, head_dim].
        rotation: float32 [head_dim, head_dim].
        planes: int64 [group, 4, words], out: the levels' bits.
        level: float32 [3, group], out: the step; what a product lacks for the grid's middle, over
            the step; half the variance of an estimate, over the square of the key's scale.
    """
    group, head_dim = query.shape
    turned = np.empty(head_dim, np.float32)
    sources = np.arange(head_dim)
    for head in range(group):
        turned[:] = _ZERO
        add_rows(query[head], rotation, sources, turned)
        most, square = _ZERO, _ZERO
        for channel in range(head_dim):
            size = abs(turned[channel])
            most = size if size > most or size != size else most  # a nan stays
            square += query[head, channel] * query[head, channel]
        step = most / _MIDDLE if not most < np.float32(1e-30) else np.float32(1e-30)
        total = 0
        for word in range(planes.shape[2]):
            one, two, four, eight = 0, 0, 0, 0
            for channel in range(word * 64, min(word * 64 + 64, head_dim)):
                place = turned[channel] / step + np.float32(8)
                whole = int(min(place, np.float32(15))) if place >= _ONE else 0  # nan: 0
                total += whole
                one |= (whole & 1) << (channel & 63)
                two |= (whole >> 1 & 1) << (channel & 63)
                four |= (whole >> 2 & 1) << (channel & 63)
                eight |= (whole >> 3) << (channel & 63)
            planes[head, 0, word], planes[head, 1, word] = one, two
            planes[head, 2, word], planes[head, 3, word] = four, eight
        level[0, head] = step
        level[1, head] = np.float32(_MIDDLE * np.float32(head_dim) - np.float32(total))
        level[2, head] = square * _HALF_NOISE


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
def _estimate_page(
    codes: Any, scales: Any, page: int, centre: Any, column: int, planes: Any, level: Any,
    sums: Any, out: Any, place: int,
) -> None:  # fmt: skip
    """Estimates of a page's 64 keys, to `out` [group, keys] from `place` on."""
    long_vectors()
    words = codes.shape[1]
    ones, total = sums[0], sums[1]
    code, size = codes[page], scales[page]
    for key in range(64):
        ones[key] = -15 * popcount(code[0, key])
    for word in range(1, words):
        for key in range(64):
            ones[key] -= 15 * popcount(code[word, key])
    for head in range(planes.shape[0]):
        step, shift, less = level[0, head], level[1, head], level[2, head]
        middle = centre[head, column]
        scores = out[head, place : place + 64]
        before = ones
        for word in range(0, words, 2):
            # Two words at once, the second of which may be none.
            other = min(word + 1, words - 1)
            there = -1 if other > word else 0
            one, two = planes[head, 0, word], planes[head, 1, word]
            four, eight = planes[head, 2, word], planes[head, 3, word]
            uno, due = planes[head, 0, other] & there, planes[head, 1, other] & there
            quattro, otto = planes[head, 2, other] & there, planes[head, 3, other] & there
            for key in range(64):
                bits, more = code[word, key], code[other, key]
                count = popcount(bits & eight) + popcount(more & otto)
                count = count + count + popcount(bits & four) + popcount(more & quattro)
                count = count + count + popcount(bits & two) + popcount(more & due)
                count = count + count + popcount(bits & one) + popcount(more & uno)
                count = before[key] + count + count
                total[key] = count
            before = total
        for key in range(64):
            product = step * (np.float32(total[key]) + shift)
            scores[key] = (product - less * size[key]) * size[key] + middle


@jit
def scan_codes(
    keys: Keys, place: Place, blocks: Any, query: Any, planes: Any, level: Any, mass: Any, peak: Any
) -> None:
    """The estimated masses of some blocks of a row's keys.

    Args:
        keys: see there.
        place: see there.
        blocks: the first block and the one behind the last; the row's first is that of the page
            that holds the first key that it sees.
        query: float32 [group, head_dim], scaled.
        planes: see `level_query`.
        level: likewise.
        mass: float32 [group, keys], out; 0 of keys that the row does not see.
        peak: float32 [2, group, blocks], out: a block's masses are in units of e ** the first, and
            the second is their sum.
    """
    long_vectors()
    sums = np.empty((2, 64), np.int64)
    centre = np.empty((query.shape[0], BLOCK), np.float32)
    for block in range(blocks[0], blocks[1]):
        pages = pages_of(keys, place, block)
        dot_rows(query, keys.key_mean, pages, centre, 0)
        for index in range(pages.shape[0]):
            _estimate_page(
                keys.codes, keys.scale, pages[index], centre, index, planes, level, sums,
                mass, (block * BLOCK + index) * 64,
            )  # fmt: skip
        _settle(place, block, mass, peak)


@jit
def pages_of(keys: Keys, place: Place, block: int) -> Any:
    """Where the pages of a block lie: int64 [pages]."""
    low = block * BLOCK
    pages = np.empty(max(min(BLOCK, place.coded // 64 - low), 0), np.int64)
    for index in range(pages.shape[0]):
        cached = keys.tables[place.row // keys.queries, place.first + low + index]
        pages[index] = cached + place.head * keys.pages
    return pages


@jit
def _settle(place: Place, block: int, mass: Any, peak: Any) -> None:
    """A block's scores to masses."""
    long_vectors()
    low = block * BLOCK * 64
    high = max(min(low + BLOCK * 64, place.coded), low)
    for reader in range(mass.shape[0]):
        scores = mass[reader, low:high]
        for key in range(low, min(place.low, high)):
            scores[key - low] = -np.inf
        most = greatest_score(scores)
        peak[0, reader, block] = most
        peak[1, reader, block] = exponentials(scores, most)


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
