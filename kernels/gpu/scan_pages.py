"""What the scan does with some pages at a time: to load them, to score them, to note their marks.

See `kernels.gpu.lanes` for how a page's keys stand in a warp's lanes.
"""

from __future__ import annotations

import triton.language as tl

from kernels import sample
from kernels.gpu import float8
from kernels.gpu.centres import score_centres
from kernels.gpu.distance import load_slopes
from kernels.gpu.lanes import (
    add_heads,
    estimate,
    inlined,
    load_words,
    of_lane,
    running_sum,
    signed_sums,
)
from kernels.gpu.layout import CERTAIN, SLOT_BITS

BITS = tl.constexpr(sample.BITS)
ROUND = tl.constexpr(1.0 * 2**23)
"""Added to it, a number is rounded to a whole one, which its last bits then are."""


@inlined
def first_pages(
    codes, scales, table, begin, low, last, lane, warp, member,
    STEPS: tl.constexpr, WORDS: tl.constexpr, PAGE: tl.constexpr, EVERY: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Where 32 pages lie, one after the other in a warp's lanes: int32 [lanes]; and the first that
    are scored, with what is read of them.

    For a page that is not there another stands: that asks for no mask.
    """
    page = tl.maximum(begin + lane, tl.minimum(low, last))
    owned = tl.load(table + tl.minimum(page, last)).to(tl.int32)
    at, pages = tl.maximum(low - begin, 0) // EVERY * EVERY + warp, ()
    for turn in tl.static_range(0, EVERY, WARPS):
        cached = of_lane(owned, at + turn)
        words, sizes = load_page(codes, scales, cached, member, STEPS, WORDS, PAGE)
        pages += ((cached, words, sizes),)  # type: ignore[assignment]
    return owned, pages


@inlined
def taken_keys(page, low, high, first, PAGE: tl.constexpr):
    """How many keys at the beginning of pages are not free."""
    return tl.where((page < low) | (page >= high), PAGE, first - page * PAGE)


@inlined
def score_pages(
    centres, query, owned, begin, heads, lane, scale, slopes, kv_head, newest,
    PAGES: tl.constexpr, GROUP: tl.constexpr, SETS: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, DIRECT: tl.constexpr, BFLOAT: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Scores of the centres of pages from `begin` on, of each four heads, eight by eight.

    They are float32 [lanes]: lane (g, t) has page g with head t.
    """
    column, middles = lane // 4, ()
    for some in tl.static_range(SETS):
        own = ()
        for first in tl.static_range(0, PAGES, 16):
            low, high = of_lane(owned, first + column), of_lane(owned, first + 8 + column)
            own += score_centres(
                centres, query, low.to(tl.int64), high.to(tl.int64), begin + first + column, heads,
                lane, scale, slopes, kv_head, newest,
                some * 4, GROUP, DIM, PAGE, DIRECT, BFLOAT, BIASED,
            )  # fmt: skip
        middles += (own,)  # type: ignore[assignment]
    return middles


@inlined
def less_norms(middles, wholes, SETS: tl.constexpr):
    """`score_pages`, less the norms of the heads."""
    left = ()
    for some in tl.static_range(SETS):
        own = ()
        for number in tl.static_range(len(middles[some])):
            own += (middles[some][number] - wholes[some],)  # type: ignore[assignment]
        left += (own,)  # type: ignore[assignment]
    return left


@inlined
def middle_of(middles, place, turn, member, SETS: tl.constexpr):
    """Of `score_pages`, what a page has in its four heads: float32 [lanes] of each set."""
    found = ()
    for some in tl.static_range(SETS):
        eight = middles[some][0]
        for number in tl.static_range(1, len(middles[some])):
            eight = tl.where(place // 8 == number, middles[some][number], eight)
        lane = (place % 8 + turn) * 4 + member
        own = of_lane(eight.to(tl.int32, bitcast=True), lane)
        found += (own.to(tl.float32, bitcast=True),)  # type: ignore[assignment]
    return found


@inlined
def load_page(
    codes, scales, cached, member, STEPS: tl.constexpr, WORDS: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Pages' codes, as `load_words` has them, of each half of the keys; scales of each two rows."""
    words, sizes = (), ()
    codes += cached.to(tl.int64) * (WORDS * PAGE)
    scales += cached.to(tl.int64) * (PAGE // 4)
    for half in tl.static_range(2):
        words += (load_words(codes, member, half * (WORDS * PAGE // 2), STEPS, WORDS),)  # type: ignore[assignment]
        sizes += (tl.load(scales + half * (PAGE // 8)),)  # type: ignore[assignment]
    return words, sizes


@inlined
def score_page(
    words, sizes, planes, factors, middle, slopes, kv_head, taken, column, member, by_head,
    GROUP: tl.constexpr, SETS: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr,
    PAGE: tl.constexpr, DIRECT: tl.constexpr, BIASED: tl.constexpr, MASSES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Masses over the norm of a page's keys.

    Args:
        words, sizes: `load_page`.
        planes, factors, middle: of each set of heads: the queries' bits, `load_factors`, and what
            `middle_of` says of the page.
        slopes, kv_head: what distance costs, where scores depend on it.
        taken: how many keys at the page's beginning are not free.
        column, member: g and t.
        by_head: float32 [SETS, lanes], masses by head so far, kept where `MASSES`.

    Returns:
        Two keys' masses, at 0 and 2 of four: float32 [lanes], summed over the heads; `by_head`; and
        the last product.
    """
    zero = tl.zeros((32 * WARPS,), tl.float32)
    total = (zero, zero, zero, zero)
    for block in tl.static_range(PAGE // (2 * STRIDE)):
        lows, highs = (), ()
        for step in tl.static_range(STEPS):
            # Of four rows of each half.
            lows += (words[block // 2][step * 4 + block % 2 * 2],)  # type: ignore[assignment]
            highs += (words[block // 2][step * 4 + block % 2 * 2 + 1],)  # type: ignore[assignment]
        four = float8.of_word(sizes[block // 2], DIRECT)
        low_size, high_size = four[block % 2 * 2], four[block % 2 * 2 + 1]
        chosen = tl.where(column // 2 == block, 1.0, 0.0)
        for some in tl.static_range(SETS):
            low_sums, high_sums = signed_sums(lows, highs, planes[some], STEPS)
            low_score = estimate(low_sums, low_size, factors[some], middle[some])
            high_score = estimate(high_sums, high_size, factors[some], middle[some])
            if BIASED:
                slope = load_slopes(slopes, kv_head, some * 4 + member, GROUP)
                at = (block * (2 * STRIDE) + column).to(tl.float32)
                low_score += slope * at
                high_score += slope * (at + STRIDE)
            low_mass, high_mass = tl.exp2(low_score), tl.exp2(high_score)
            total = add_heads(low_mass, high_mass, chosen, total)
            if MASSES:
                at = block * (2 * STRIDE) + column
                mass = tl.where(at >= taken, low_mass, 0.0)
                mass += tl.where(at + STRIDE >= taken, high_mass, 0.0)
                by_head += tl.where(tl.arange(0, SETS)[:, None] == some, mass[None], 0.0)
    return total, by_head, high_sums


@inlined
def note_pages(
    found, end, noted, met, positions, kv, key,
    BYTES: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr,
    PLACED: tl.constexpr, FETCHED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Note the keys of some pages on which marks fall.

    Args:
        found: of each page where it lies, its number, and how long its two keys of a lane are.
        end: of the line before these pages.
        noted: keys before the line.
        met, positions: what takes a key's slot and length, and its position where `PLACED`.
        kv: from where keys met are fetched, where `FETCHED`.
        key: the first of a lane's two in its page.
    """
    for turn in tl.static_range(len(found)):
        own, page, drawn, next_drawn = found[turn]
        both = drawn + next_drawn
        stop = end + running_sum(both, WARPS)
        end += tl.sum(both, 0)
        position, slot = page * PAGE + key, own * PAGE + key
        hit, mark = _marked(drawn, stop - next_drawn)
        next_hit, next_mark = _marked(next_drawn, stop)
        _note(met + noted + mark, slot, drawn, hit)
        _note(met + noted + next_mark, slot + STRIDE, next_drawn, next_hit)
        if PLACED:
            tl.store(positions + noted + mark, position, hit)
            tl.store(positions + noted + next_mark, position + STRIDE, next_hit)
        if FETCHED:
            data = kv + slot.to(tl.int64) * (2 * WIDE)
            _fetch(data, hit, BYTES)
            _fetch(data + STRIDE * (2 * WIDE), next_hit, BYTES)


@inlined
def drawn_of(share, stretch):
    """A key's length on the line. What is no number is the greatest."""
    drawn = tl.minimum(share * stretch + ROUND, ROUND + CERTAIN)
    # The last bits are now a whole number.
    return drawn.to(tl.int32, bitcast=True) & (2 * CERTAIN - 1)


@inlined
def _marked(drawn, end):
    """Whether a mark falls on a key that lies up to `end`, as long as is drawn; and its number."""
    mark = (end - drawn) >> BITS
    return (end >> BITS) > mark, mark


@inlined
def _note(place, slot, drawn, hit):
    low = slot.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.store(place, low | (drawn.to(tl.int64) << SLOT_BITS), hit)


@inlined
def _fetch(pointers, wanted, BYTES: tl.constexpr):
    """Bring keys that will be read soon into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $3; } // $0",
        "=r,l,r,n",
        [pointers.to(tl.int64), wanted.to(tl.int32), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
