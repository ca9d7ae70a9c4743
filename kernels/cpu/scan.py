"""Estimated scores of coded keys.

From the keys' one-bit codes (`kernels.codes`), by counting bits: a query is rounded to 16 levels,
as RaBitQ does, so that its product with a row of signs is a sum of popcounts over its four bit
planes; that adds 3% to the variance of an estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.codes import NOISE
from kernels.cpu.keys import fall_in_page, fall_of_pages, key_of, pages_of
from kernels.cpu.launch import jit
from kernels.cpu.number import join_words, long_vectors, number, popcount
from kernels.cpu.vectors import add_rows, dot_rows
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place

_ZERO, _ONE = np.float32(0), np.float32(1)
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
        planes: int64 [group, 4, words / 2], out: the levels' bits.
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
def room_of(planes: Any) -> Any:
    """Room for what `estimate_page` computes."""
    return np.empty((planes.shape[2] + 2, 64), np.int64), np.empty(64, np.float32)


@jit
def estimate_page(
    codes: Any, scales: Any, page: Any, planes: Any, level: Any, room: Any, out: Any
) -> None:
    """What the codes of a page's 64 keys add to the score of the page's centre.

    Args:
        codes: uint32 [pages, 16, words, 4].
        scales: float8 [pages, 64], by fours, as all below.
        page: which of them.
        planes: see `level_query`.
        level: likewise.
        room: see `room_of`, of any content.
        out: float32 [group, 64], out.
    """
    long_vectors()
    words, (sums, factors) = codes.shape[2] // 2, room
    code, ones, total = sums[:words], sums[words], sums[words + 1]
    size = scales[page]
    for key in range(64):
        factors[key] = number(size[key])
    for word in range(words):
        for four in range(16):
            join_words(codes[page, four], word, code[word], four)
    for key in range(64):
        ones[key] = -15 * popcount(code[0, key])
    for word in range(1, words):
        for key in range(64):
            ones[key] -= 15 * popcount(code[word, key])
    for head in range(planes.shape[0]):
        step, shift, less = level[0, head], level[1, head], level[2, head]
        scores = out[head]
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
            factor = factors[key]
            product = step * (np.float32(total[key]) + shift)
            scores[key] = (product - less * factor) * factor


@jit
def scan_segment(
    keys: Keys, place: Place, segment: int, query: Any, planes: Any, level: Any, scores: Any
) -> None:
    """Score the keys of a segment.

    Args:
        keys: see there.
        place: see there.
        segment: see `pages_of`.
        query: float32 [group, head_dim], scaled.
        planes: see `level_query`.
        level: likewise.
        scores: float32 [group, SEGMENT * 64], out: -inf of keys that are not free.
    """
    low, pages = pages_of(keys, place, segment, segment + 1)
    first = low - segment * SEGMENT
    centre, room = np.empty((scores.shape[0], SEGMENT), np.float32), room_of(planes)
    out = np.empty((scores.shape[0], 64), np.float32)
    scores[:] = -np.inf
    dot_rows(query, keys.centre, pages, centre, first)
    fall_of_pages(keys, place, low, pages.shape[0], centre, first)
    for index in range(pages.shape[0]):
        estimate_page(keys.codes, keys.scale, pages[index], planes, level, room, out)
        fall_in_page(keys, place, out)
        page = first + index
        for head in range(scores.shape[0]):
            for key in range(64):
                scores[head, page * 64 + key_of(key)] = out[head, key] + centre[head, page]
    scores[:, : max(place.low - segment * SEGMENT * 64, 0)] = -np.inf
