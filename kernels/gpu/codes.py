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
OFFSET = tl.constexpr(1.5 * 2**23)
"""Added to a whole number up to 2 ** 22, it makes a float32 whose last bits are that number."""
OFFSET_BITS = tl.constexpr(0x4B400000)
"""The same as an int32."""
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
    steps += (
        line * (8 * DEEP * WIDE) + tl.arange(0, DEEP)[:, None] + tl.arange(0, WIDE)[None] * DEEP
    )
    return (
        _load(steps), _load(steps + DEEP * WIDE),
        _load(steps + 2 * DEEP * WIDE), _load(steps + 3 * DEEP * WIDE),
        _load(steps + 4 * DEEP * WIDE), _load(steps + 5 * DEEP * WIDE),
        _load(steps + 6 * DEEP * WIDE), _load(steps + 7 * DEEP * WIDE),
    )  # fmt: skip


@triton.jit
def _load(pointers):
    """Load, and bring into the order of a product's operand where this stands, not in a loop."""
    return _only(tl.load(pointers), 255)


@triton.jit
def signed_sums(octets, steps):
    """Sums of the queries' steps where a sign is set, times 128.

    Args:
        octets: int8 [keys, DEEP], codes of several pages' keys side by side.
        steps: see `load_steps`.

    Returns:
        float32 [keys, WIDE], `OFFSET` more than the sums: whole numbers are so of use without being
        converted, which is slow.
    """
    third, sixth = _shifted(octets, 3), _shifted(octets, 6)
    total = tl.full((octets.shape[0], steps[7].shape[1]), OFFSET_BITS, tl.int32)
    total = tl.dot(_only(octets, 128), steps[7], total, out_dtype=tl.int32)
    total = tl.dot(_only(octets, 64), steps[6], total, out_dtype=tl.int32)
    total = tl.dot(_only(octets, 32), steps[5], total, out_dtype=tl.int32)
    total = tl.dot(_only(third, 128), steps[4], total, out_dtype=tl.int32)
    total = tl.dot(_only(third, 64), steps[3], total, out_dtype=tl.int32)
    total = tl.dot(_only(third, 32), steps[2], total, out_dtype=tl.int32)
    total = tl.dot(_only(sixth, 128), steps[1], total, out_dtype=tl.int32)
    total = tl.dot(_only(sixth, 64), steps[0], total, out_dtype=tl.int32)
    return total.to(tl.float32, bitcast=True)


@triton.jit
def load_factors(factors, line, head, PADDED: tl.constexpr):
    """Factors of a sum, of a code's scale and of its square, float32 of the heads' shape each."""
    place = factors + line * (3 * PADDED) + head
    factor = tl.load(place)
    return factor, tl.load(place + PADDED) - OFFSET * factor, tl.load(place + 2 * PADDED)


@triton.jit
def estimate(sums, size, factors, centre):
    """Base-2 logs of masses from the sums, the keys' scales and the scores of the pages' means."""
    return size * (sums * factors[0] + (factors[1] - factors[2] * size)) + centre
