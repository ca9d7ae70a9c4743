"""A row's candidates: named by the codes, scored exactly (`kernels.candidates`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.codes import NOISE
from kernels.cpu.launch import jit
from kernels.cpu.number import bits, exp, number_of_bits
from kernels.cpu.scan import BLOCK

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys

_ZERO, _NOISE = np.float32(0), np.float32(NOISE)
_INFINITE, _SIZE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)


@jit
def share_bits(share: Any, rank: Any) -> None:
    """The bits of `share` [keys] to `rank` [keys]; of what is not a number, infinity's."""
    for key in range(share.shape[0]):
        size = bits(share[key]) & _SIZE
        rank[key] = size if size < _INFINITE else _INFINITE


@jit
def rank_keys(mass: Any, weight: Any, rank: Any) -> None:
    """Each key's mean share over the group's heads.

    Args:
        mass: float32 [group, keys], in units of its block.
        weight: float32 [group, blocks], share of a head's unit, over the number of heads.
        rank: int32 [keys], out: bits of the shares.
    """
    group, keys = mass.shape[0], rank.shape[0]
    size = BLOCK * 64
    share = np.empty(size, np.float32)
    for block in range(weight.shape[1]):
        low = block * size
        high = min(low + size, keys)
        part = share[: high - low]
        part[:] = _ZERO
        for head in range(group):
            own, factor = mass[head, low:high], weight[head, block]
            for key in range(part.shape[0]):
                part[key] += own[key] * factor
        share_bits(part, rank[low:high])


@jit
def take(mass: Any, factor: Any, named: Any, own: Any) -> None:
    """Move the masses of the keys `named` [n] from `mass` [group, keys] to `own` [group, n]."""
    for head in range(mass.shape[0]):
        for place in range(named.shape[0]):
            key = named[place]
            own[head, place] = mass[head, key] * factor[head, key // (BLOCK * 64)]
            mass[head, key] = _ZERO


@jit
def returned(
    keys: Keys, slots: Any, query: Any, weight: Any, least: Any, own: Any, back: Any,
) -> None:  # fmt: skip
    """The mass of the candidates that would be none after the tilt, by head.

    Args:
        keys: the cache.
        slots: int64 [n], where the candidates lie.
        query: float32 [group, head_dim], scaled.
        weight: float32 [group], share of a head's unit, over the number of heads.
        least: bits of the least candidate's share.
        own: float32 [group, n], their masses.
        back: float32 [group], out.
    """
    group, count = own.shape
    noise, share = np.empty(count, np.float32), np.empty(count, np.float32)
    for place in range(count):
        size = keys.scale[slots[place] >> 6, slots[place] & 63]
        noise[place] = size * size * _NOISE
    lowest = number_of_bits(least)
    for reader in range(group):
        share[:] = _ZERO
        for other in range(group):
            overlap = _ZERO
            for channel in range(query.shape[1]):
                overlap -= query[reader, channel] * query[other, channel]
            mass, factor = own[other], weight[other]
            for place in range(count):
                share[place] += mass[place] * factor * exp(overlap * noise[place])
        total, mass = _ZERO, own[reader]
        for place in range(count):
            total += mass[place] if share[place] < lowest else _ZERO
        back[reader] = total


@jit
def slots_of(keys: Keys, head: int, row: int, first: int, named: Any) -> Any:
    """Where the keys `named` [n], whose numbers begin with page `first`, lie: int64 [n]."""
    slots = np.empty(named.shape[0], np.int64)
    sequence, offset = row // keys.queries, head * keys.pages
    for place in range(named.shape[0]):
        key = named[place]
        page = keys.tables[sequence, first + (key >> 6)] + offset
        slots[place] = page * 64 + (key & 63)
    return slots
