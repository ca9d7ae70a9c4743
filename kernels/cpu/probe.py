"""A first look: the pages' centres, and a few keys of each page (`kernels.budget.probed`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.budget import PROBE
from kernels.codes import FOURS
from kernels.cpu.keys import fall, fall_of_pages, kept_of, key_of, pages_of, slots_of
from kernels.cpu.launch import jit
from kernels.cpu.scan import estimate_page, room_of
from kernels.cpu.vectors import dot_rows
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place


@jit
def probe_pages(
    keys: Keys, place: Place, first: int, last: int, query: Any, planes: Any, level: Any,
    centre: Any, score: Any,
) -> None:  # fmt: skip
    """Score the centres and the probed keys of the pages in segments `first` to `last`.

    Args:
        keys: see there.
        place: see there.
        first: see `pages_of`.
        last: likewise.
        query: float32 [group, head_dim], scaled.
        planes: see `level_query`.
        level: likewise.
        centre: float32 [group, pages], out.
        score: float32 [group, probes_of(place) ..], out: log of the mass for which a probed key
            stands, -inf where it is not free.
    """
    low, pages = pages_of(keys, place, first, last)
    stored, sizes = keys.codes, keys.scale
    dot_rows(query, keys.centre, pages, centre, low)
    fall_of_pages(keys, place, low, pages.shape[0], centre, low)
    # The probed keys of several pages, as if they were one page's.
    group, codes = score.shape[0], np.empty((1, *stored.shape[1:]), np.uint32)
    scales, out = np.empty((1, 64), np.uint8), np.empty((group, 64), np.float32)
    room = room_of(planes)
    each = SEGMENT // place.apart  # probed pages of a segment
    stands = np.log(np.float32(place.apart * FOURS))
    stop = min(last * each, probes_of(place) // PROBE)
    for begin in range(first * each, stop, FOURS):
        many = min(FOURS, stop - begin)
        for index in range(many):
            page = _page(place, begin + index)
            if low <= page < low + pages.shape[0]:
                cached, four = pages[page - low], _four(place, page)
                codes[0, index] = stored[cached, four]
                for probe in range(PROBE):
                    scales[0, index * PROBE + probe] = sizes[cached, four * PROBE + probe]
        # Not a literal 0, of which a version of its own would be compiled.
        estimate_page(codes, scales, np.int64(0), planes, level, room, out)
        for head in range(group):
            own = score[head, begin * PROBE : (begin + many) * PROBE]
            own[:] = -np.inf
            for index in range(many):
                page = _page(place, begin + index)
                if low <= page < low + pages.shape[0]:
                    four, middle = _four(place, page), centre[head, page] + stands
                    for probe in range(index * PROBE, (index + 1) * PROBE):
                        key = key_of(four * PROBE + probe - index * PROBE)
                        if page * 64 + key >= place.low:
                            own[probe] = out[head, probe] + middle
                        if keys.slopes.shape[0] > 0:
                            slope = keys.slopes[place.head * group + head]
                            own[probe] += slope * np.float32(key)


@jit
def probes_of(place: Place) -> int:
    """How many keys are probed, with those that the last pages may lack."""
    return (place.coded // 64 + place.apart - 1) // place.apart * PROBE


@jit
def _page(place: Place, number: int) -> int:
    """A probed page, as `place` numbers them."""
    page = number * place.apart
    return page + (place.first + page) // FOURS % place.apart


@jit
def _four(place: Place, page: int) -> Any:
    """Which keys of a page are probed."""
    return (place.first + page) * 7 % FOURS


@jit
def score_kept(keys: Keys, place: Place, query: Any, out: Any, offset: int) -> int:
    """Exact scores of the keys that are always read, to `out` from `offset` on; how many."""
    kept = kept_of(place)
    dot_rows(query, keys.kv, slots_of(keys, place.head, place.row, kept) * 2, out, offset)
    fall(keys, place, kept, out, offset)
    return len(kept)
