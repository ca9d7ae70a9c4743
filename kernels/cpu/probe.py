"""A first look: the pages' means, and a few keys of each page (`kernels.budget.probed`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.budget import EACH, PROBE
from kernels.cpu.keys import fall, fall_of_pages, kept_of, pages_of, slots_of
from kernels.cpu.launch import jit
from kernels.cpu.scan import estimate_page
from kernels.cpu.vectors import dot_rows
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place

_LOG_EACH = np.float32(math.log(EACH))


@jit
def probe_pages(
    keys: Keys, place: Place, first: int, last: int, query: Any, planes: Any, level: Any,
    centre: Any, score: Any,
) -> None:  # fmt: skip
    """Score the means and the probed keys of the pages in segments `first` to `last`.

    Args:
        keys: see there.
        place: see there.
        first: see `pages_of`.
        last: likewise.
        query: float32 [group, head_dim], scaled.
        planes: see `level_query`.
        level: likewise.
        centre: float32 [group, pages], out.
        score: float32 [group, pages * PROBE ..], out: log of the mass for which a probed key
            stands, -inf where it is not free.
    """
    low, pages = pages_of(keys, place, first, last)
    stored, sizes = keys.codes, keys.scale
    dot_rows(query, keys.key_mean, pages, centre, low)
    fall_of_pages(keys, place, low, pages.shape[0], centre, low)
    # The probed keys of several pages, as if they were one page's.
    group, codes = score.shape[0], np.empty((1, keys.codes.shape[1], 64), np.int64)
    scales, out = np.empty((1, 64), np.uint16), np.empty((group, 64), np.float32)
    sums = np.empty((2, 64), np.int64)
    for begin in range(0, pages.shape[0], EACH):
        many = min(EACH, pages.shape[0] - begin)
        for index in range(many):
            page, source = pages[begin + index], _probed(place, low + begin + index)
            for probe in range(PROBE):
                scales[0, index * PROBE + probe] = sizes[page, source + probe]
            for word in range(codes.shape[1]):
                for probe in range(PROBE):
                    codes[0, word, index * PROBE + probe] = stored[page, word, source + probe]
        # Not a literal 0, of which a version of its own would be compiled.
        estimate_page(codes, scales, np.int64(0), planes, level, sums, out)
        for head in range(group):
            for index in range(many):
                page = low + begin + index
                middle = centre[head, page] + _LOG_EACH
                for probe in range(PROBE):
                    score[head, page * PROBE + probe] = out[head, index * PROBE + probe] + middle
                if keys.slopes.shape[0] > 0:
                    slope = keys.slopes[place.head * group + head]
                    for probe in range(PROBE):
                        key = np.float32(_probed(place, page) + probe)
                        score[head, page * PROBE + probe] += slope * key
    for head in range(group):
        for probe in range(first * SEGMENT * PROBE, min(low, place.coded // 64) * PROBE):
            score[head, probe] = -np.inf
        for probe in range(PROBE if pages.shape[0] > 0 else 0):
            if low * 64 + _probed(place, low) + probe < place.low:
                score[head, low * PROBE + probe] = -np.inf


@jit
def _probed(place: Place, page: int) -> Any:
    """The first probed key of a page: its place there."""
    return (place.first + page) * 7 % EACH * PROBE


@jit
def score_kept(keys: Keys, place: Place, query: Any, out: Any, offset: int) -> int:
    """Exact scores of the keys that are always read, to `out` from `offset` on; how many."""
    kept = kept_of(place)
    dot_rows(query, keys.kv, slots_of(keys, place.head, place.row, kept) * 2, out, offset)
    fall(keys, place, kept, out, offset)
    return len(kept)
