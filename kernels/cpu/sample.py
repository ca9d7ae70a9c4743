"""Each key's share of a row's attention, and its priority in the draw (`kernels.sample`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.cpu.launch import jit
from kernels.cpu.number import bits, long_vectors, number_of_bits
from kernels.cpu.scan import BLOCK
from kernels.sample import BITS, STEP, TURN

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_UNIT = np.float32(2.0**-BITS)
_STEP, _SHIFT = np.uint32(STEP), np.uint32(32 - BITS)
_INFINITE, _SIZE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)


@jit
def rank_keys(
    mass: Any, factor: Any, head: int, first: int, sampled: bool, share: Any, rank: Any
) -> None:
    """Bits of each key's mean share over the group's heads, and of its priority.

    Args:
        mass: float32 [group, keys], in units of its block.
        factor: float32 [group, blocks], the blocks' units, as shares of a head's whole mass.
        head: the KV head.
        first: position of the first key.
        sampled: whether priorities are those of a sample; else they are the shares.
        share: int32 [keys], out; of what is not a number, infinity's.
        rank: int32 [keys], out, likewise of the priorities.
    """
    long_vectors()
    keys, size = rank.shape[0], BLOCK * 64
    part, mean = np.empty(size, np.float32), _ONE / np.float32(mass.shape[0])
    for block in range(factor.shape[1]):
        low = block * size
        count = min(size, keys - low)
        part[:] = _ZERO
        for reader in range(mass.shape[0]):
            own, weight = mass[reader, low : low + count], factor[reader, block] * mean
            for key in range(count):
                part[key] += own[key] * weight
        shares, ranks = share[low : low + count], rank[low : low + count]
        _to_bits(part, shares)
        if sampled:
            # From here on modulo 2 ** 32.
            turn = np.uint32((first + low) * STEP + head * TURN)
            for key in range(count):
                whole = np.uint32(np.uint32(key) * _STEP + turn) >> _SHIFT
                uniform = (np.float32(np.int32(whole)) + _HALF) * _UNIT
                part[key] = number_of_bits(shares[key]) / uniform
        _to_bits(part, ranks)


@jit
def _to_bits(number: Any, rank: Any) -> None:
    long_vectors()
    for key in range(rank.shape[0]):
        size = bits(number[key]) & _SIZE
        rank[key] = size if size < _INFINITE else _INFINITE
