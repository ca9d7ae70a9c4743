"""Products of quantised queries with the keys' codes, on the tensor cores.

A code's signs stand in bytes. A mask leaves one of a byte's bits, and the byte is then 0 or, as an
int8, -128, 64 or 32: so the product of bytes with a query in int8 adds up the query's channels
where the signs are set, and after a shift by 3 and by 6 bits the other five come to these places.
The query's steps are chosen after the place, so that all products count alike; that leaves it 6 to
8 bits, far finer than signs.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

PLACES = tl.constexpr(3)
"""Places at which a byte's bits are read, and the bits by which they are shifted."""
LEVELS = tl.constexpr(31.75)
"""Steps of a query's greatest channel: four times as many fit an int8."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter has no assembler."""


@triton.constexpr_function
def _instruction(mask, shift):
    if shift:
        return f"shl.b32 $0, $1, {shift};"
    return f"and.b32 $0, $1, 0x{mask * 0x01010101:08x};"


@triton.jit
def _only(octets, MASK: tl.constexpr):
    """`octets & MASK`, four bytes an instruction."""
    if INTERPRETED:
        octets = (octets.to(tl.int32) & MASK).to(tl.int8)
    else:
        octets = tl.inline_asm_elementwise(
            _instruction(MASK, 0), "=r,r", [octets], dtype=tl.int8, is_pure=True, pack=4
        )
    return octets


@triton.jit
def _shifted(octets, SHIFT: tl.constexpr):
    """`octets << SHIFT`; a byte's low bits are then its neighbour's, and of no meaning."""
    if INTERPRETED:
        octets = (octets.to(tl.int32) << SHIFT).to(tl.int8)
    else:
        octets = tl.inline_asm_elementwise(
            _instruction(0, SHIFT), "=r,r", [octets], dtype=tl.int8, is_pure=True, pack=4
        )
    return octets


@triton.jit
def load_steps(steps, line, DEEP: tl.constexpr, WIDE: tl.constexpr):
    """A line's queries, by the bit of a byte: 8 tensors int8 [DEEP, WIDE]."""
    place = line * (8 * DEEP * WIDE) + tl.arange(0, DEEP)[:, None] + tl.arange(0, WIDE)[None] * DEEP
    return (
        tl.load(steps + place), tl.load(steps + place + DEEP * WIDE),
        tl.load(steps + place + 2 * DEEP * WIDE), tl.load(steps + place + 3 * DEEP * WIDE),
        tl.load(steps + place + 4 * DEEP * WIDE), tl.load(steps + place + 5 * DEEP * WIDE),
        tl.load(steps + place + 6 * DEEP * WIDE), tl.load(steps + place + 7 * DEEP * WIDE),
    )  # fmt: skip


@triton.jit
def signed_sums(octets, steps):
    """Sums of the queries' steps where a sign is set, times 128.

    Args:
        octets: int8 [keys, DEEP], codes of several pages' keys side by side.
        steps: see `load_steps`.

    Returns:
        int32 [keys, WIDE].
    """
    third, sixth = _shifted(octets, 3), _shifted(octets, 6)
    total = tl.dot(_only(octets, 128), steps[7], out_dtype=tl.int32)
    total = tl.dot(_only(octets, 64), steps[6], total, out_dtype=tl.int32)
    total = tl.dot(_only(octets, 32), steps[5], total, out_dtype=tl.int32)
    total = tl.dot(_only(third, 128), steps[4], total, out_dtype=tl.int32)
    total = tl.dot(_only(third, 64), steps[3], total, out_dtype=tl.int32)
    total = tl.dot(_only(third, 32), steps[2], total, out_dtype=tl.int32)
    total = tl.dot(_only(sixth, 128), steps[1], total, out_dtype=tl.int32)
    return tl.dot(_only(sixth, 64), steps[0], total, out_dtype=tl.int32)


@triton.jit
def load_factors(factors, line, head, PADDED: tl.constexpr):
    """Factors of a sum, of a code's scale and of its square: float32 [1, WIDE] each."""
    place = factors + line * (3 * PADDED) + head
    return tl.load(place)[None], tl.load(place + PADDED)[None], tl.load(place + 2 * PADDED)[None]


@triton.jit
def estimate(sums, size, factors, centre):
    """Base-2 logs of masses, [keys, WIDE], from the sums, the keys' scales and the pages' means."""
    return size * (sums.to(tl.float32) * factors[0] + (factors[1] - factors[2] * size)) + centre
