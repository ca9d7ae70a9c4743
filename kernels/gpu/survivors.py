"""`kernels.survivors` in lanes: a warp lists what is read of one segment or two, a lane a page."""

from __future__ import annotations

import triton.language as tl

from kernels import sample, survivors
from kernels.gpu.lanes import INTERPRETED, inlined, load_four

STEP = tl.constexpr(sample.STEP - (1 << 32))  # as int32
TURN = tl.constexpr(sample.TURN - (1 << 32))
PACE = tl.constexpr(survivors.PACE)
SURE, STRATUM = tl.constexpr(survivors.SURE), tl.constexpr(survivors.STRATUM)
STRATA, READ = tl.constexpr(survivors.STRATA), tl.constexpr(survivors.READ)
SEGMENT = tl.constexpr(sample.SEGMENT)
RANKS = tl.constexpr(
    "{ .reg .pred p; .reg .b32 l, t, m1, m2, m4, m8; mov.u32 l, %laneid; mov.b32 $0, 0;"
    + "".join(
        f" and.b32 t, l, {bit}; setp.ne.u32 p, t, 0; selp.b32 t, 1, 0, p; sub.s32 m{bit}, $1, t;"
        for bit in (1, 2, 4, 8)
    )
    + "".join(
        f" shfl.sync.bfly.b32 t, $1, {other}, 31, -1;"
        f" setp.gt.s32 p, t, m{1 << other.bit_length() - 1}; @p add.s32 $0, $0, 1;"
        for other in range(1, SEGMENT.value)
    )
    + " }"
)
"""How many of a half's lanes have a greater number, or the same and are before this one.

Of lanes whose numbers differ in some bits, the one that has not the highest of these is before.
"""
IN_ORDER = tl.constexpr(sum(number << 4 * number for number in range(16)) - (1 << 64))
"""A list of all pages, as int64."""


@inlined
def list_survivors(
    centres, norm, segment, kv_head, length, low, high, thinned, lane,
    GROUP: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Which pages of one or two segments on end are read.

    Args:
        centres: scores of the line's means, by page and head.
        norm: the line's, by head.
        segment: the first one's number.
        kv_head, length: of the line.
        low, high: pages that have free keys.
        thinned: whether half of the pages are read; else all are.
        lane: int32 [lanes], of a warp.

    Returns:
        Numbers of the pages in their segments, 4 bits of an int64 [lanes] each, those of the second
        segment behind those of the first; of all pages for both segments the same. And bits of an
        int32 [lanes] for the pages of both, set where a page stands for itself alone.
    """
    index, half = lane % SEGMENT, lane // SEGMENT
    which = half % TOGETHER
    own = segment + which
    page = own * SEGMENT + index
    there = (page >= low) & (page < high)
    rank = _ranks(_greatest(centres, norm, page, there, GROUP, PADDED))
    number = own * STEP + kv_head.to(tl.int32) * TURN + length * PACE
    stratum, place = (rank - SURE) // STRATUM, (rank - SURE) % STRATUM
    for power in tl.static_range(STRATA - 1):
        number = tl.where(stratum > power, number * STRATUM, number)
    drawn = (number.to(tl.uint32, bitcast=True).to(tl.int64) * STRATUM >> 32).to(tl.int32)
    sure = (rank < SURE) | ~thinned
    read = sure | (place == drawn)
    before = (_bits_of(read) >> half * SEGMENT) & ((1 << index) - 1)
    place = _ones(before) + which * READ
    four = tl.where(read & (half < TOGETHER), index << place % 8 * 4, 0)
    low_half = _union(tl.where(place < 8, four, 0)).to(tl.uint32, bitcast=True).to(tl.int64)
    listed = low_half | (_union(tl.where(place < 8, 0, four)).to(tl.int64) << 32)
    return tl.where(thinned, listed, IN_ORDER), _bits_of(sure)


@inlined
def _greatest(centres, norm, page, there, GROUP: tl.constexpr, PADDED: tl.constexpr):
    """By how much a page's mean is above the norm in the head where it is most: [lanes]."""
    page = tl.where(there, page, 0)
    greatest = tl.full(page.shape, float("-inf"), tl.float32)
    for first in tl.static_range(0, GROUP, 4):
        scores = ()
        if PADDED % 4 == 0:
            words = load_four(centres + page * PADDED + first, False)
            for head in tl.static_range(4):
                scores += (words[head].to(tl.float32, bitcast=True),)  # type: ignore[assignment]
        else:
            for head in tl.static_range(PADDED):
                scores += (tl.load(centres + page * PADDED + head),)  # type: ignore[assignment]
        for some in tl.static_range(min(len(scores), GROUP - first)):
            score = scores[some] - tl.load(norm + first + some)
            greatest = tl.maximum(greatest, tl.where(score == score, score, float("inf")))
    return tl.where(there, greatest, float("-inf"))


@inlined
def _ranks(score):
    """The places of 16 lanes' scores in their order: int32 [lanes]."""
    if INTERPRETED:
        halves = tl.reshape(score, (score.shape[0] // SEGMENT, SEGMENT))
        index = tl.arange(0, SEGMENT)
        one, other = halves[:, :, None], halves[:, None]
        before = (other > one) | ((other == one) & (index[None] < index[:, None])[None])
        ranks = tl.reshape(tl.sum(before.to(tl.int32), 2), score.shape)
    else:
        bits = (score + 0.0).to(tl.int32, bitcast=True)  # no negative zero
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in the numbers' order
        ranks = tl.inline_asm_elementwise(
            RANKS, "=&r,r", [bits], dtype=tl.int32, is_pure=True, pack=1
        )
    return ranks


@inlined
def _bits_of(flags):
    """Bit n of a warp's lane n, int32 in each of its lanes."""
    if INTERPRETED:
        lanes = tl.arange(0, flags.shape[0]) % 32
        bits = _union(tl.where(flags, 1 << lanes, 0))
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, -1; }",
            "=r,r", [flags.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits


@inlined
def _union(words):
    """All bits of a warp's lanes, of which none has another's, in each: int32 [lanes]."""
    if INTERPRETED:
        warps = tl.reshape(words, (words.shape[0] // 32, 32))
        bits = tl.sum(warps, 1)[:, None]
        bits = tl.reshape(tl.broadcast_to(bits, warps.shape), words.shape)
    else:
        bits = tl.inline_asm_elementwise(
            "redux.sync.or.b32 $0, $1, -1;", "=r,r", [words],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits


@inlined
def _ones(words):
    """How many bits are set in the lower 16: int32 [lanes]."""
    if INTERPRETED:
        ones = tl.sum((words[:, None] >> tl.arange(0, 16)[None]) & 1, 1)
    else:
        ones = tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        )
    return ones
