"""The keys on which a mark falls (`kernels.sample`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.keys import fall_in_page, key_of, pages_of
from kernels.cpu.launch import inlined, jit
from kernels.cpu.number import add_columns, exp, long_vectors, popcount
from kernels.cpu.scan import estimate_page, room_of
from kernels.sample import BITS, SEGMENT, STEP, STRIDE, TURN

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place
    from kernels.cpu.work import Work

_ZERO, _ONE = np.float32(0), np.float32(1)
_WHOLE = np.int32(1 << BITS)
_UNITS, _UNIT = np.float32(1 << BITS), np.float32(2.0**-BITS)
_SHIFT, _COLUMN = 32 - BITS, 64 // STRIDE


@jit
def draw_keys(keys: Keys, work: Work, unit: int, place: Place, first: int, last: int) -> int:
    """Draw keys of segments `first` to `last`, page by page.

    Args:
        keys: see there.
        work: see there; out: `named` and `weight`.
        unit: whose keys.
        place: where these lie.
        first: see `pages_of`.
        last: likewise.

    Returns:
        How many are drawn.
    """
    long_vectors()
    low, pages = pages_of(keys, place, first, last)
    group, everything = work.norm.shape[1], work.marks[unit] >= place.coded - place.low
    factor = np.float32(work.marks[unit]) / np.float32(group)
    scores, length = np.empty((group, 64), np.float32), np.empty(64, np.int32)
    room, share = room_of(work.planes[unit]), np.empty(64, np.float32)
    columns, end = np.empty(STRIDE, np.int32), 0
    begin = total = first * SEGMENT * 64
    # Views are made once: each counts a reference.
    codes, scales, planes, level = keys.codes, keys.scale, work.planes[unit], work.level[unit]
    centre, norm = work.centre[unit], work.norm[unit]
    named, weight = work.named[unit], work.weight[unit]
    for index in range(pages.shape[0]):
        page = low + index
        if index == 0 or page % SEGMENT == 0:
            line = (place.first + page) // SEGMENT
            end = (line * STEP + place.head * TURN & 0xFFFFFFFF) >> _SHIFT
        if everything:
            length[:] = _WHOLE
        else:
            estimate_page(codes, scales, pages[index], planes, level, room, scores)
            fall_in_page(keys, place, scores)
            _measure(scores, centre, page, norm, factor, share, length)
        for key in range(place.low - page * 64):
            length[key] = 0
        hits, end = _marked(length, columns, end)
        while hits != 0:
            key = popcount((hits & -hits) - 1)
            hits &= hits - 1
            part = np.float32(length[key]) * _UNIT
            named[total] = page * 64 + key
            weight[total] = -np.log(part) if part < _ONE else _ZERO
            total += 1
    return total - begin


@inlined
def _measure(
    scores: Any, centre: Any, page: int, norm: Any, factor: Any, share: Any, length: Any
) -> None:
    """A page's scores to lengths on the line.

    Args:
        scores: float32 [group, 64], without those of the page's mean, by fours.
        centre: see `probe_pages`.
        page: which one.
        norm: see `spend`.
        factor: marks for each head of the group.
        share: float32 [64], of any content.
        length: int32 [64], out.
    """
    long_vectors()
    share[:] = _ZERO
    for head in range(scores.shape[0]):
        shift = centre[head, page] - norm[head]
        for key in range(64):
            share[key] += exp(scores[head, key] + shift)
    for key in range(64):
        part = share[key] * factor
        part = part if part < _ONE else _ONE  # of what is no number, too
        length[key_of(key)] = np.int32(np.rint(part * _UNITS))


@inlined
def _marked(length: Any, columns: Any, end: int) -> Any:
    """The keys of a page on which a mark falls.

    Args:
        length: int32 [64].
        columns: int32 [8], of any content.
        end: where the line ends before them.

    Returns:
        A bit for each key, and where the line ends.
    """
    add_columns(length, columns)
    hits = 0
    for column in range(STRIDE):
        behind = end + columns[column]
        if behind >> BITS > end >> BITS:
            for row in range(_COLUMN):
                key = row * STRIDE + column
                after = end + length[key]
                hits |= int(after >> BITS > end >> BITS) << key
                end = after
        end = behind
    return hits, end
