"""Draws of a row's unselected keys, which correct the means of their pages: `kernels.draws`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.launch import jit
from kernels.cpu.scan import BLOCK, add_rows

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys, Place

_ZERO = np.float32(0)


@jit
def correct(
    keys: Keys, place: Place, draws: int, mass: Any, factor: Any, unit: Any, left: Any, mean: Any
) -> None:
    """Add the mean difference of drawn values from their pages' means, by `kernels.draws`.

    Args:
        keys: the cache.
        place: the row and KV head.
        draws: how many, from 1.
        mass: float32 [group, keys], of unselected keys, in units of their block; 0 of others.
        factor: float32 [group, blocks], the blocks' units.
        unit: float32 [group], a unit's share of all that a head leaves out.
        left: float32 [group, pages], shares of it by page.
        mean: float32 [group, head_dim], out: the correction is added.
    """
    group, pages = left.shape
    total = np.float64(0)
    for page in range(pages):
        for reader in range(group):
            total += left[reader, page]
    if not total > 0:
        return
    drawn, sources = np.empty(draws, np.int64), np.empty(draws, np.int64)
    weight = np.empty((group, draws), np.float32)
    share, cached = np.empty(64, np.float32), np.int64(0)
    page, key, last = -1, 63, -1  # `last` of the page's keys that can be drawn at all
    until = reached = np.float64(0)  # shares up to the page's end, and up to the key
    for draw in range(draws):
        target = total * ((draw + 0.5) / draws)
        turned = page < 0
        before = until
        while (page < 0 or until < target) and page + 1 < pages:
            page += 1
            turned, before = True, until
            for reader in range(group):
                until += left[reader, page]
        if turned:
            share[:] = _ZERO
            for reader in range(group):
                part = factor[reader, page // BLOCK] * unit[reader]
                for one in range(64):
                    share[one] += mass[reader, page * 64 + one] * part
            cached = keys.tables[place.row // keys.queries, place.first + page]
            cached += place.head * keys.pages
            key, last, reached = -1, -1, before
        while key < 63 and (reached < target or last < 0):
            key += 1
            reached += share[key]
            last = key if share[key] > _ZERO else last  # rounding must not lead past it
        one = max(last, 0)
        drawn[draw], sources[draw] = (cached * 64 + one) * 2 + 1, cached
        # The heads draw by their sum: what one of them has more or less of it is its weight.
        part = np.float32(total / draws) / share[one] if last >= 0 else _ZERO
        for reader in range(group):
            own = mass[reader, page * 64 + one] * factor[reader, page // BLOCK] * unit[reader]
            weight[reader, draw] = own * part
    for reader in range(group):
        add_rows(weight[reader], keys.kv, drawn, mean[reader])
        for draw in range(draws):
            weight[reader, draw] = -weight[reader, draw]
        add_rows(weight[reader], keys.value_mean, sources, mean[reader])
