"""The scan of all codes: every key's share of the attention, and on which keys a mark falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import sample
from kernels.gpu import float8, overlap
from kernels.gpu.centres import centres_of, score_centres
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import (
    add_heads,
    estimate,
    inlined,
    load_factors,
    load_planes,
    load_words,
    of_lane,
    own_word,
    running_sum,
    signed_sums,
)
from kernels.gpu.launch import MULTIPROCESSORS, mostly_cache
from kernels.gpu.layout import CERTAIN, HELD, SLOT_BITS
from kernels.gpu.look import EACH, look_here
from kernels.gpu.look_lanes import look_in_lanes
from kernels.gpu.prepare import LOG2E
from kernels.page import PAGE
from kernels.sample import SEGMENT, STRIDE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch
    from kernels.gpu.look import Look

BITS = tl.constexpr(sample.BITS)
STEP = tl.constexpr(sample.STEP - (1 << 32))  # as int32
TURN = tl.constexpr(sample.TURN - (1 << 32))
DROPPED = tl.constexpr(32 - sample.BITS)
ROUND = tl.constexpr(1.0 * 2**23)
"""Added to it, a number is rounded to a whole one, which its last bits then are."""
REGISTERS = (128, 96, 80, 64)
"""Of a thread, at the most: the first that lets all programs begin at once. With fewer some
multiprocessors would take more programs than others.
"""
DEPTH = tl.constexpr(2)
"""Pages of a warp that are on their way at once, each in registers of its own."""
WARPS = 2
"""Of a program that also reads the keys it meets: few such programs have a GPU to themselves."""


def scan(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    layout: Layout,
    scratch: Scratch,
    *,
    positions: Tensor | None = None,
    shares: Tensor | None = None,
    masses: Tensor | None = None,
    look: Look | None = None,
) -> None:
    """Score every key that is free, and note those on which a mark falls.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read.
        scale: factor on the scores.
        layout: the launch's sizes.
        scratch: what is read and written.
        positions: int32, of the shape of what is met: takes its positions, where wanted.
        shares: float32 [lines, pages * 64], takes every free key's share, where wanted.
        masses: float32 [lines, spans, padded], takes each program's mass by head, over the norm,
            where wanted.
        look: attention to the keys met and to those always read, where wanted.
    """
    overlaps = overlap.possible(cache.codes.device)
    unused, looks = scratch.norm, look is not None
    centres, asked, direct = centres_of(cache, query)
    parts = (unused, cache.kv, unused, unused, unused, unused)
    if look is not None:
        looking, kv, outputs = look.words(look.query, cache.kv, look.outputs)
        parts = (looking, kv, scratch.always, outputs, look.lses, look.owns)
    width = triton.next_power_of_2(layout.head_dim)
    warps = WARPS if looks else 1
    kernel = _scan[layout.lines, layout.spans + (HELD // EACH if looks else 0)](
        cache.codes, cache.scale.view(torch.int32), rows.block_tables, rows.starts, rows.lengths,
        slopes_of(cache), scratch.planes, scratch.factors, asked, centres, scratch.norm,
        scratch.marks, scratch.met, scratch.counts,
        unused if positions is None else positions, unused if shares is None else shares,
        unused if masses is None else masses, *parts,
        scale * LOG2E.value, sinks, rows.queries, layout.kv_heads, layout.pages, layout.spans,
        rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, SETS=layout.sets, STEPS=layout.steps,
        WORDS=layout.words, SPAN=layout.span, SEGMENT=SEGMENT, STRIDE=STRIDE, PAGE=PAGE,
        DIRECT=direct, PLACED=positions is not None, SHARES=shares is not None,
        MASSES=masses is not None,
        LOOKS=looks, HEADS=max(8, layout.padded), DIM=layout.head_dim, WIDTH=width, HELD=HELD,
        EACH=EACH, BLOCK=16 * warps, BYTES=2 * layout.head_dim * cache.kv.itemsize,
        BIASED=cache.slopes is not None, LANES=look is not None and look.lanes,
        BFLOAT=cache.kv.dtype == torch.bfloat16, WARPS=warps, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=warps, num_stages=1,
        maxnreg=registers_for(layout.lines * layout.spans),
    )  # fmt: skip
    mostly_cache(kernel)


def registers_for(programs: int) -> int:
    """Of a thread, where so many programs of one warp are to begin at once."""
    each = -(-programs // MULTIPROCESSORS)
    return next((few for few in REGISTERS if 2048 // few >= each), REGISTERS[-1])


@triton.jit(
    do_not_specialize=[
        "sinks", "queries", "kv_heads", "pages", "spans", "table_stride", "cache_pages"
    ]
)  # fmt: skip
def _scan(
    codes, scales, tables, starts, lengths, slopes, planes, factors, asked, centres, norm, marks,
    met, counts, positions, shares, masses, query, kv, always, outputs, lses, owns,
    scale, sinks, queries, kv_heads, pages, spans, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, SETS: tl.constexpr, STEPS: tl.constexpr,
    WORDS: tl.constexpr, SPAN: tl.constexpr, SEGMENT: tl.constexpr, STRIDE: tl.constexpr,
    PAGE: tl.constexpr, DIRECT: tl.constexpr, PLACED: tl.constexpr, SHARES: tl.constexpr,
    MASSES: tl.constexpr,
    LOOKS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr,
    BIASED: tl.constexpr, LANES: tl.constexpr, BFLOAT: tl.constexpr, WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some segments of one line, or some of its keys always read: see `kernels.gpu.lanes`.

    A warp takes a page at a time, whose keys are 8 rows of 8. The products leave what belongs to
    column g in lanes 4 g to 4 g + 3, and the sum over heads leaves two keys in each, so that the
    lanes' keys follow each other as on the line.
    """
    line, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
    nothing = (tl.load(lengths + row) >> 48).to(tl.int32)  # 0, which a compiler cannot know
    low = tl.maximum(span * (SPAN * SEGMENT), start // PAGE)
    high = tl.minimum((span + 1) * (SPAN * SEGMENT), tl.maximum(length // PAGE - 1, 0))
    first = tl.maximum(start, sinks)  # key that is free
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    column, member = lane // 4, lane % 4
    table = tables + (row // queries) * table_stride
    codes += kv_head * cache_pages * (WORDS * PAGE) + column * (WORDS * 4)
    codes += own_word(member, WORDS)
    scales += kv_head * cache_pages * (PAGE // 4) + column
    centres += kv_head * cache_pages * (DIM // 4 if DIRECT else DIM)
    shares += line * pages * PAGE
    own_span = line * spans + span
    met += own_span * (SPAN * SEGMENT * PAGE)
    positions += own_span * (SPAN * SEGMENT * PAGE)
    wide: tl.constexpr = DIM // 2 if LANES else DIM
    kv += kv_head * cache_pages * (PAGE * 2 * wide)
    last = tl.maximum(high - 1, 0)
    every: tl.constexpr = DEPTH * WARPS
    together: tl.constexpr = min(SPAN * SEGMENT, 32)  # pages, of one segment or two
    # Pages that were full before this step need not be waited for, nor the query (`_probe`).
    begin = span * (SPAN * SEGMENT)
    owned, pending = _first_pages(
        codes, scales, table, begin, low, last, lane, warp, member, STEPS, WORDS, PAGE, every, WARPS
    )
    middles = _score_pages(
        centres, asked, owned, begin, line * GROUP, lane, scale, slopes, kv_head, length - 1,
        together, GROUP, SETS, DIM, PAGE, DIRECT, BFLOAT, BIASED,
    )  # fmt: skip
    overlap.wait(OVERLAP)
    overlap.begin(OVERLAP)  # not before: what follows waits for programs of this kernel alone
    number = tl.load(marks + line)
    high = tl.where(number == 0, 0, high)
    # Units of the line for a mass of 1 in one head; where all keys are read, whatever the mass.
    stretch = tl.where(number < 0, float("inf"), number.to(tl.float32) * (CERTAIN / GROUP))
    line_planes, line_factors, wholes = (), (), ()
    for some in tl.static_range(SETS):
        set_planes = planes + (line * SETS + some) * (STEPS * 2 * 32)
        line_planes += (load_planes(set_planes, lane, STEPS),)  # type: ignore[assignment]
        line_factors += (load_factors(factors, line, member, PADDED, some),)  # type: ignore[assignment]
        head = some * 4 + member
        whole = tl.load(norm + line * PADDED + head, head < PADDED, 0.0)
        wholes += (whole,)  # type: ignore[assignment]
    middles = _less(middles, wholes, SETS)
    key = member * (2 * STRIDE) + column  # the first of a lane's two
    phase = kv_head.to(tl.int32) * TURN
    by_head = tl.zeros((SETS, 32 * WARPS), tl.float32)
    noted = low * 0
    for part in range(0, SPAN * SEGMENT, together):
        begin = span * (SPAN * SEGMENT) + part
        first_place = tl.maximum(low - begin, 0) // every * every
        end_place = tl.minimum(high - begin, together)
        edge = (begin * PAGE < first) | (begin < low) | (begin + together > high)
        turned = begin // SEGMENT * STEP + phase
        end_of_line = (turned >> DROPPED) & (CERTAIN - 1)
        if together > SEGMENT:
            next_line = ((turned + STEP) >> DROPPED) & (CERTAIN - 1)
            end_of_line = tl.where(first_place > SEGMENT, next_line, end_of_line)
        for place in range(first_place, end_place, every):
            if together > SEGMENT:  # each has a line of its own
                begins = place == SEGMENT
                noted += tl.where(begins, end_of_line >> BITS, 0)
                end_of_line = tl.where(begins, next_line, end_of_line)
            before, pending, found = pending, (), ()
            next_place = tl.minimum(place + every, together - every)
            for turn in tl.static_range(DEPTH):
                page = begin + place + turn * WARPS + warp
                following = next_place + turn * WARPS + warp
                own, words, sizes = before[turn]
                middle = _middle_of(middles, place, turn * WARPS + warp, member, SETS)
                taken = _taken(page, low, high, first, PAGE)
                total, by_head, last_sums = _score_page(
                    words, sizes, line_planes, line_factors, middle, slopes, kv_head, taken,
                    column, member, by_head,
                    GROUP, SETS, STEPS, STRIDE, PAGE, DIRECT, BIASED, MASSES, WARPS,
                )  # fmt: skip
                # Not loaded before the last product is done: what is loaded then takes the place of
                # what was multiplied, and nothing has to be moved.
                later = last_sums.to(tl.int32, bitcast=True) & nothing
                cached = of_lane(owned, following) + later
                words, sizes = _load_page(codes, scales, cached, member, STEPS, WORDS, PAGE)
                pending += ((cached, words, sizes),)
                if turn + 1 < DEPTH:  # or a compiler puts all pages' loads behind all products
                    tl.debug_barrier()
                drawn, next_drawn = _drawn(total[0], stretch), _drawn(total[2], stretch)
                if edge:
                    drawn = tl.where(key >= taken, drawn, 0)
                    next_drawn = tl.where(key + STRIDE >= taken, next_drawn, 0)
                if SHARES:
                    share, inside = shares + page * PAGE + key, (page >= low) & (page < high)
                    tl.store(share, tl.where(key >= taken, total[0] / GROUP, 0.0), inside)
                    free = key + STRIDE >= taken
                    tl.store(share + STRIDE, tl.where(free, total[2] / GROUP, 0.0), inside)
                found += ((own, page, drawn, next_drawn),)  # type: ignore[assignment]
            begin_of_pages = end_of_line
            for turn in tl.static_range(DEPTH):
                end_of_line += tl.sum(found[turn][2] + found[turn][3], 0)
            # All pages' marks at once: what one waits for another uses.
            if (end_of_line >> BITS) != (begin_of_pages >> BITS):
                _note_pages(
                    found, begin_of_pages, noted, met, positions, kv, key, BYTES, wide,
                    STRIDE, PAGE, PLACED, LOOKS and OVERLAP, WARPS,
                )  # fmt: skip
        noted += end_of_line >> BITS
        if together < SPAN * SEGMENT:
            owned, pending = _first_pages(
                codes, scales, table, begin + together, low, last, lane, warp, member,
                STEPS, WORDS, PAGE, every, WARPS,
            )  # fmt: skip
            middles = _score_pages(
                centres, asked, owned, begin + together, line * GROUP, lane, scale, slopes, kv_head,
                length - 1, together, GROUP, SETS, DIM, PAGE, DIRECT, BFLOAT, BIASED,
            )  # fmt: skip
            middles = _less(middles, wholes, SETS)
    if MASSES:
        head = tl.arange(0, SETS)[:, None] * 4 + tl.arange(0, 4)[None]
        mass = tl.sum(tl.reshape(by_head, (SETS, 8 * WARPS, 4)), 1)
        tl.store(masses + own_span * PADDED + head, mass, head < PADDED)
    if span < spans:
        overlap.publish(counts + own_span, noted)
    if LOOKS:
        tl.debug_barrier()
        query += line * (GROUP * wide)
        always += line * HELD
        slopes += kv_head * GROUP
        lost = number == 0
        if LANES:
            look_in_lanes(
                query, kv, met, positions, always, slopes, outputs, lses, owns, scale,
                line * GROUP, span, tl.num_programs(1) * WARPS, spans, 1, start, length, lost,
                noted, noted, 0, GROUP, DIM, EACH, PAGE, 1, BIASED, BFLOAT, WARPS,
            )  # fmt: skip
        else:
            look_here(
                query, kv, met, positions, always, slopes, outputs, lses, owns, scale,
                line * GROUP, span, tl.num_programs(1), spans, 1, start, length, lost, noted,
                GROUP, HEADS, DIM, WIDTH, EACH, BLOCK, PAGE, BIASED,
            )  # fmt: skip


@inlined
def _first_pages(
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
        words, sizes = _load_page(codes, scales, cached, member, STEPS, WORDS, PAGE)
        pages += ((cached, words, sizes),)  # type: ignore[assignment]
    return owned, pages


@inlined
def _taken(page, low, high, first, PAGE: tl.constexpr):
    """How many keys at the beginning of pages are not free."""
    return tl.where((page < low) | (page >= high), PAGE, first - page * PAGE)


@inlined
def _score_pages(
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
def _less(middles, wholes, SETS: tl.constexpr):
    """`_score_pages`, less the norms of the heads."""
    left = ()
    for some in tl.static_range(SETS):
        own = ()
        for number in tl.static_range(len(middles[some])):
            own += (middles[some][number] - wholes[some],)  # type: ignore[assignment]
        left += (own,)  # type: ignore[assignment]
    return left


@inlined
def _middle_of(middles, place, turn, member, SETS: tl.constexpr):
    """Of `_score_pages`, what a page has in its four heads: float32 [lanes] of each set."""
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
def _load_page(
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
def _score_page(
    words, sizes, planes, factors, middle, slopes, kv_head, taken, column, member, by_head,
    GROUP: tl.constexpr, SETS: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr,
    PAGE: tl.constexpr, DIRECT: tl.constexpr, BIASED: tl.constexpr, MASSES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Masses over the norm of a page's keys.

    Args:
        words, sizes: `_load_page`.
        planes, factors, middle: of each set of heads: the queries' bits, `load_factors`, and what
            `_middle_of` says of the page.
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
def _note_pages(
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
def _drawn(share, stretch):
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
