"""`kernels.gpu.look` in lanes: 16 keys a warp, all of them asked for at once.

Keys are the rows of the first product and heads its columns, channels the rows of the second: lane
(g, t) has keys g and 8 + g with heads 2 t and 2 t + 1. Nothing passes through shared memory, so
that a warp's keys and values are on their way together. See `kernels.gpu.lanes` for what g and t
are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.distance import load_slopes
from kernels.gpu.lanes import (
    inlined,
    load_four,
    log2,
    lower_halves,
    multiply,
    of_pairs,
    over_rows,
    pack,
    store_four,
    turn,
    upper_halves,
)
from kernels.gpu.layout import CERTAIN, SLOT_BITS
from kernels.gpu.softmax import finite

KEYS = tl.constexpr(16)
"""Keys of a warp's products."""
COLUMNS = tl.constexpr(8)
"""Heads of a product."""


@triton.jit
def look_in_lanes(
    query, kv, met, positions, always, slopes, outputs, lses, owns, scale,
    first_head, split, splits, lists, parts, start, length, lost, noted, first, gap,
    GROUP: tl.constexpr, DIM: tl.constexpr, EACH: tl.constexpr, PAGE: tl.constexpr,
    JOINED: tl.constexpr, BIASED: tl.constexpr, BFLOAT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Attention of one line to the keys that its marks met here, or to some always read.

    `query`, `kv` and `outputs` are of words, two channels each. Every warp leaves a part of its
    own. Where lists are joined, what is met lies behind the `first` keys with a gap between.
    """
    thread = tl.arange(0, 32 * WARPS)
    warp, column, member = thread // 32, thread % 32 // 4, thread % 4
    drawn, part = split < lists * parts, split - lists * parts
    notes = tl.where(drawn, met, always)
    begin = tl.where(drawn, split % parts * (KEYS * WARPS), part * EACH)
    end = tl.where(drawn, noted, tl.where(length > start, part * EACH + EACH, 0))
    first = tl.where(drawn, first, end)
    each = tl.where(drawn, parts, 1) * (KEYS * WARPS)
    states, sums = _nothing(tl.zeros((32 * WARPS,), tl.float32), GROUP, DIM)
    for block in range(begin, end, each):
        place = block + warp * KEYS + column
        keys, values, sizes = _load_keys(
            kv, notes, place, end, first, gap, column, member, DIM, JOINED
        )
        distances = (0.0, 0.0)
        if BIASED:
            distances = (
                _distance(positions, place, drawn, length, end, first, gap, PAGE, JOINED),
                _distance(positions, place + 8, drawn, length, end, first, gap, PAGE, JOINED),
            )
        # All keys and values are asked for before the first is used, because the queries are loaded
        # last: a compiler would rather save registers.
        tl.debug_barrier()
        states, sums = _add_keys(
            query, keys, values, sizes, distances, slopes, states, sums, scale, column, member,
            GROUP, DIM, BIASED, BFLOAT,
        )  # fmt: skip
    # Where the mass is not finite nothing was drawn, and that shows.
    extra = tl.where(lost, float("nan"), 0.0)
    for number in tl.static_range(len(states)):
        head = number // 2 * COLUMNS + member * 2 + number % 2
        place = (first_head + head) * splits + split * WARPS + warp
        peak, mass, own_mass = states[number]
        mass, own_mass = over_rows(mass, SUM=True) + extra, over_rows(own_mass, SUM=True) + extra
        inverse = 1.0 / tl.where(mass == 0.0, 1.0, mass)
        target = outputs + place * (DIM // 2) + column * 4
        _store(target, sums, inverse, head < GROUP, number, DIM, BFLOAT)
        peak = finite(peak)
        there = (head < GROUP) & (column == 0)
        tl.store(lses + place, peak + log2(mass), there)
        tl.store(owns + place, peak + log2(own_mass * (1.0 / CERTAIN)), there)


@inlined
def _nothing(zero, GROUP: tl.constexpr, DIM: tl.constexpr):
    """What attention to no key leaves.

    Returns:
        States of heads 2 t and 2 t + 1 of each product's heads: their peak, the mass over it, and
        the mass of each key counted once. And sums over the values: of each word of a lane's
        channels, the first with both heads, then the second.
    """
    states, sums = (), ()
    for _ in tl.static_range((GROUP + COLUMNS - 1) // COLUMNS):
        state = (zero + float("-inf"), zero, zero)
        states += (state, state)  # type: ignore[assignment]
        for _word in tl.static_range(DIM // 16):
            sums += ((zero, zero, zero, zero),)  # type: ignore[assignment]
    return states, sums


@inlined
def _load_keys(
    kv, notes, place, end, first, gap, column, member, DIM: tl.constexpr, JOINED: tl.constexpr
):  # fmt: skip
    """Keys g and 8 + g, the values of 2 t, 2 t + 1, and those 8 behind, and the keys' lengths.

    Behind the last key it is read again, and is of no length: that asks for no mask.
    """
    last = tl.maximum(end - 1, 0)
    keys, values, sizes = (), (), ()
    for half in tl.static_range(2):
        own = tl.minimum(place + half * 8, last)
        note = tl.load(notes + _across(own, first, gap, JOINED))
        size = (note >> SLOT_BITS).to(tl.int32).to(tl.float32)
        sizes += (tl.where(place + half * 8 < end, size, 0.0),)  # type: ignore[assignment]
        slot = note.to(tl.int32)
        keys += (_load_part(kv, _wide(slot) * 2, member, 4, DIM),)  # type: ignore[assignment]
        even, odd = of_pairs(slot)
        values += (_load_part(kv, _wide(even) * 2 + 1, column, 8, DIM),)  # type: ignore[assignment]
        values += (_load_part(kv, _wide(odd) * 2 + 1, column, 8, DIM),)  # type: ignore[assignment]
    return keys, values, sizes


@inlined
def _add_keys(
    query, keys, values, sizes, distances, slopes, states, sums, scale, column, member,
    GROUP: tl.constexpr, DIM: tl.constexpr, BIASED: tl.constexpr, BFLOAT: tl.constexpr,
):  # fmt: skip
    """States and sums with a block's keys; see `_nothing`."""
    words: tl.constexpr = DIM // 16
    new_states, new_sums = (), ()
    for some in tl.static_range((GROUP + COLUMNS - 1) // COLUMNS):
        # Where there is no such head another stands, and is not stored.
        head = tl.minimum(some * COLUMNS + column, GROUP - 1)
        heads = _load_part(query, head, member, 4, DIM)
        zero = tl.zeros(column.shape, tl.float32)
        four = multiply(keys[0], keys[1], heads, (zero, zero, zero, zero), BFLOAT)
        scores = (four[0] * scale, four[1] * scale, four[2] * scale, four[3] * scale)
        if BIASED:
            even = load_slopes(slopes, 0, some * COLUMNS + member * 2, GROUP)
            odd = load_slopes(slopes, 0, some * COLUMNS + member * 2 + 1, GROUP)
            scores = (
                scores[0] + even * distances[0],
                scores[1] + odd * distances[0],
                scores[2] + even * distances[1],
                scores[3] + odd * distances[1],
            )
        even = _weighed(scores[0], scores[2], sizes, states[2 * some])
        odd = _weighed(scores[1], scores[3], sizes, states[2 * some + 1])
        new_states += (even[0], odd[0])  # type: ignore[assignment]
        shares = (turn(pack(even[1], odd[1], BFLOAT)), turn(pack(even[2], odd[2], BFLOAT)))
        for word in tl.static_range(words):
            four = sums[some * words + word]
            four = (four[0] * even[3], four[1] * odd[3], four[2] * even[3], four[3] * odd[3])
            one, two, three, last = (
                values[0][word],
                values[1][word],
                values[2][word],
                values[3][word],
            )
            rows = (lower_halves(one, two), lower_halves(three, last))
            others = (upper_halves(one, two), upper_halves(three, last))
            new_sums += (multiply(rows, others, shares, four, BFLOAT),)  # type: ignore[assignment]
    return new_states, new_sums


@inlined
def _weighed(low, high, sizes, state):
    """One head's state with keys g and 8 + g, their shares, and by how much others shrink."""
    # Each key counts 1 / p times.
    low = tl.where(sizes[0] > 0.0, low - log2(sizes[0] * (1.0 / CERTAIN)), float("-inf"))
    high = tl.where(sizes[1] > 0.0, high - log2(sizes[1] * (1.0 / CERTAIN)), float("-inf"))
    peak = tl.maximum(state[0], over_rows(tl.maximum(low, high), SUM=False))
    safe = finite(peak)
    low, high, shrink = tl.exp2(low - safe), tl.exp2(high - safe), tl.exp2(state[0] - safe)
    mass = state[1] * shrink + (low + high)
    own_mass = state[2] * shrink + (low * sizes[0] + high * sizes[1])
    return (peak, mass, own_mass), low, high, shrink


@inlined
def _store(
    target, sums, inverse, there, NUMBER: tl.constexpr, DIM: tl.constexpr, BFLOAT: tl.constexpr
):
    """One head's part, lane g's channels of it, to where they begin."""
    words: tl.constexpr = DIM // 16
    for word in tl.static_range(0, words, 4):
        packed = ()
        for more in tl.static_range(4):
            four = sums[NUMBER // 2 * words + word + more]
            low, high = four[NUMBER % 2] * inverse, four[2 + NUMBER % 2] * inverse
            packed += (pack(low, high, BFLOAT),)  # type: ignore[assignment]
        store_four(target + word * 8, packed, there)


@inlined
def _load_part(data, row, lane, LANES: tl.constexpr, DIM: tl.constexpr):
    """What one of some lanes has of rows of `DIM` channels: int32 [lanes] each, two channels."""
    words = ()
    for place in tl.static_range(0, DIM // 2, 4 * LANES):
        words += load_four(data + row * (DIM // 2) + lane * 4, place)
    return words


@inlined
def _wide(slot):
    """A slot's 32 bits as an int64."""
    return slot.to(tl.uint32, bitcast=True).to(tl.int64)


@inlined
def _across(place, first, gap, JOINED: tl.constexpr):
    """Where a key of joined lists lies."""
    if JOINED > 1:
        place = tl.where(place < first, place, place + gap)
    return place


@inlined
def _distance(
    positions, place, drawn, length, end, first, gap, PAGE: tl.constexpr, JOINED: tl.constexpr
):  # fmt: skip
    """From the newest key back to those at some places, not positive."""
    window = tl.maximum(length // PAGE - 1, 0) * PAGE - PAGE
    position = tl.where(place < PAGE, place, window + place)
    there = place < tl.where(drawn, end, 0)
    position = tl.load(positions + _across(place, first, gap, JOINED), there, position)
    return (position - (length - 1)).to(tl.float32)
