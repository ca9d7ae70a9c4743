"""Products of quantised queries with the keys' codes: bits with bits, on the tensor cores.

A code is a key's signs. A query's channel is a whole odd number of steps, the sum of `PLANES` signs
of which each counts twice the one before. So a product of both is in how many channels two signs
agree, plane by plane, and that is what tensor cores count, without a bit being unpacked: where both
are set, and where neither is (PTX `mma.m16n8k256` with `and.popc`).

Such a product's operands lie where the hardware wants them, so a kernel is written for one warp,
in tensors of 32 numbers: one in each lane. Lane 4 g + t has key g of eight, and head t of four: its
products of 128 bits take word t of the keys' codes, and leave head t's counts of key g in the same
lane.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

WORD = tl.constexpr(32)
"""Bits of a code that a lane brings to a product."""
HEADS = 4
"""Query heads that are multiplied at once, a lane's t each."""
PLANES = tl.constexpr(4)
"""Signs of a query's channel: what they round away adds 2% to the variance of an estimate."""
LEVELS = tl.constexpr(2**PLANES.value - 1)
"""Steps of a query's greatest channel."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter has no assembler."""


def inlined(function):
    """`triton.jit` for a small function; in the interpreter the function itself.

    A call of a compiled function costs the interpreter a thousand times what an operation does.
    """
    return function if INTERPRETED.value else triton.jit(function)


@inlined
def _count(low, high, plane, other, sums):
    """Four `sums` int32 [32] and the number of bits in which keys and planes agree.

    Word t of key g is in `low`, of key 8 + g in `high`, of plane g % 2 of head g // 2 in `plane`,
    the channels where it is not set in `other`, int32 [32] each. Sums are of key g with the first
    and the second plane of head t, and of 8 + g.
    """
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [low, high, ~low, ~high, plane, other, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@inlined
def add_heads(low, high, chosen, sums):
    """`sums` and the four heads' sums of chosen keys.

    Args:
        low: float32 [32], of key g and head t; its last 13 bits are lost.
        high: likewise of key 8 + g.
        chosen: float32 [32], 1 in the lanes whose g // 2 names the t that takes the sums, else 0.
        sums: four float32 [32]: lane (g, t) has twice the sum of key g, and twice that of 8 + g.
    """
    if INTERPRETED:
        columns = tl.trans(tl.reshape(chosen, (8, 4)))
        a, b = tl.split(tl.reshape(tl.dot(tl.reshape(low, (8, 4)), columns), (8, 4, 2)))
        c, d = tl.split(tl.reshape(tl.dot(tl.reshape(high, (8, 4)), columns), (8, 4, 2)))
        sums = tuple(
            one + tl.reshape(more, (32,)) for one, more in zip(sums, (a, b, c, d), strict=True)
        )
    else:
        sums = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32"
            " {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
            "=f,=f,=f,=f,r,r,r,f,f,f,f",
            [
                low.to(tl.int32, bitcast=True),
                high.to(tl.int32, bitcast=True),
                chosen.to(tl.int32, bitcast=True),
                sums[0], sums[1], sums[2], sums[3],
            ],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    return sums


@inlined
def load_planes(planes, STEPS: tl.constexpr):
    """Four heads' queries as `signed_sums` takes them: `STEPS * 4` int32 [32].

    Args:
        planes: where they begin: int32 [STEPS, 2, 2, 32]. Of each two planes first the lower, in
            the place of a head's first and second; channels where it is set, and where not; lanes.
    """
    lane = tl.arange(0, 32)
    words = ()
    for number in tl.static_range(STEPS * 4):
        words += (tl.load(planes + number * 32 + lane),)  # type: ignore[assignment]
    return words


@inlined
def signed_sums(low, high, planes, STEPS: tl.constexpr):
    """In how many channels a key's sign and the query's agree, each plane counting by its weight.

    Args:
        low: `STEPS` int32 [32], every fourth word from word t on of key g.
        high: likewise of key 8 + g.
        planes: see `load_planes`.

    Returns:
        float32 [32] and [32], of key g and key 8 + g with head t.
    """
    if INTERPRETED:
        first, second = _sums(low, planes, STEPS), _sums(high, planes, STEPS)
    else:
        zero = tl.zeros((32,), tl.int32)
        sums = (zero, zero, zero, zero)
        for step in tl.static_range(STEPS):
            one, two = planes[step * 4], planes[step * 4 + 1]
            sums = _count(low[step], high[step], one, two, sums)
            one, two = planes[step * 4 + 2], planes[step * 4 + 3]
            for _ in tl.static_range(2):  # these planes count twice
                sums = _count(low[step], high[step], one, two, sums)
        first = (sums[0] + (sums[1] << 2)).to(tl.float32)
        second = (sums[2] + (sums[3] << 2)).to(tl.float32)
    return first, second


@inlined
def _sums(words, planes, STEPS: tl.constexpr):
    """What `signed_sums` says of one key a lane, without tensor cores."""
    total = tl.full((8, 8), 0.0, tl.float32)
    for step in range(STEPS):
        word = tl.reshape(words[step], (8, 4))
        signs, others = _bits(word), _bits(~word)  # [8, 128]
        for tile in range(2):
            plane, other = (
                _bits(tl.reshape(one, (8, 4))) for one in planes[step * 4 + tile * 2 :][:2]
            )
            agreed = tl.dot(signs, tl.trans(plane)) + tl.dot(others, tl.trans(other))
            total += agreed * (1.0 + tile)  # [keys, heads * 2]
    first, second = tl.split(tl.reshape(total, (8, 4, 2)))
    return tl.reshape(first + second * 4.0, (32,))


@inlined
def _bits(words):
    """int32 [8, 4] as float32 [8, 128]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None]) & 1
    return tl.reshape(bits.to(tl.float32), (8, 128))


@inlined
def load_factors(factors, line, PADDED: tl.constexpr, SET: tl.constexpr):
    """Head t's factors of a sum, of a code's scale and of its square: float32 [32] each."""
    head = SET * 4 + tl.arange(0, 32) % 4
    place, there = factors + line * (3 * PADDED) + head, head < PADDED
    return (
        tl.load(place, there, 0.0),
        tl.load(place + PADDED, there, 0.0),
        tl.load(place + 2 * PADDED, there, 0.0),
    )


@inlined
def estimate(sums, size, factors, centre):
    """Base-2 logs of masses from the sums, the keys' scales and the scores of the pages' means."""
    return size * (sums * factors[0] + (factors[1] - factors[2] * size)) + centre
