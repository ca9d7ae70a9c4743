"""Before the keys are scored: the query in the form of the codes, and the keys always read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.codes import NOISE, rotation
from kernels.gpu import overlap
from kernels.gpu.distance import load_slopes, slopes_of
from kernels.gpu.lanes import HEADS, INTERPRETED, PLANES, WORD
from kernels.gpu.launch import mostly_cache
from kernels.gpu.layout import CERTAIN, HELD, SLOT_BITS
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

CHANNELS = 64
"""Channels that are rotated at once."""
LEAST = 8
"""Columns of the smallest product, which heads stand in."""
LOG2E = tl.constexpr(math.log2(math.e))
HALF_NOISE = tl.constexpr(NOISE / 2)


def prepare(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    sinks: int,
    scale: float,
    layout: Layout,
    scratch: Scratch,
) -> None:
    """Rotate and quantise the queries; find and score the sinks and the recent window."""
    wide = query.dtype if query.dtype != torch.float64 else torch.float32
    overlaps = overlap.possible(query.device)
    room = layout.sets * HEADS
    tile = max(LEAST, room)
    turns = triton.cdiv(layout.lines, tile // room)
    kernel = _prepare[(turns + layout.lines * (HELD // PAGE),)](
        query, rotation(layout.head_dim, wide, query.device), cache.kv, rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.planes, scratch.factors, scratch.held,
        scratch.always, scratch.counts,
        scale, sinks, rows.queries, layout.lines, turns, layout.kv_heads, layout.spans,
        rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, ROOM=room, TILE=tile,
        DIM=layout.head_dim, WIDTH=triton.next_power_of_2(layout.head_dim),
        STEPS=layout.steps, SETS=layout.sets, HELD=HELD, PAGE=PAGE,
        CHANNELS=min(CHANNELS, triton.next_power_of_2(layout.head_dim)),
        SPANS=triton.next_power_of_2(layout.spans),
        HALVES=query.dtype == torch.bfloat16, BIASED=cache.slopes is not None, OVERLAP=overlaps,
        launch_pdl=overlaps, num_warps=4,
    )  # fmt: skip
    mostly_cache(kernel)


@triton.jit(
    do_not_specialize=[
        "sinks", "queries", "lines", "turns", "kv_heads", "spans", "table_stride", "cache_pages"
    ]
)  # fmt: skip
def _prepare(
    query, rotated, kv, tables, starts, lengths, slopes, planes, factors, held, always,
    counts, scale, sinks, queries, lines, turns, kv_heads, spans, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, SETS: tl.constexpr,
    HELD: tl.constexpr, PAGE: tl.constexpr, CHANNELS: tl.constexpr, SPANS: tl.constexpr,
    HALVES: tl.constexpr, BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some lines' queries, or a page of one line's keys always read."""
    number, place = tl.program_id(0), tl.arange(0, TILE)
    pages: tl.constexpr = HELD // PAGE
    held_page = tl.maximum(number - turns, 0)
    line, part = (held_page // pages).to(tl.int64), held_page % pages
    row, kv_head = line // kv_heads, line % kv_heads
    start, length = tl.load(starts + row), tl.load(lengths + row)
    stop = tl.maximum(length // PAGE - 1, 0)  # page of the recent window
    key = tl.arange(0, PAGE)
    page = tl.where(part == 0, 0, stop + part - 1)
    position = page * PAGE + key
    end = tl.where(part == 0, tl.minimum(stop * PAGE, sinks), length)
    seen = (position >= start) & (position < end)
    table = tables + (row // queries) * table_stride
    cached = tl.load(table + position // PAGE, seen, 0)
    # Where there is none stands the newest, of no length.
    newest = tl.maximum(length - 1, 0)
    newest = tl.load(table + newest // PAGE) * PAGE + newest % PAGE
    slot = (kv_head * cache_pages + cached) * PAGE + key
    # On their way to the L2 cache while the query is computed.
    if number < turns:
        overlap.prefetch_lines(rotated + tl.arange(0, WIDTH) % DIM * DIM, DIM, OVERLAP)
    else:
        overlap.prefetch_lines(kv + slot * (2 * DIM), DIM, OVERLAP)
    # The next kernel reads the query without waiting for this one: it may begin when that is there.
    overlap.wait(OVERLAP)
    overlap.begin(OVERLAP)
    if number < turns:
        owner = number.to(tl.int64) * (TILE // ROOM) + place // ROOM
        mate = tl.where(owner < lines, place % ROOM, ROOM)
        across = tl.arange(0, STEPS * 128)
        turned = tl.zeros((STEPS * 128, TILE), tl.float32)
        for first in tl.static_range(0, WIDTH, CHANNELS):
            some = first + tl.arange(0, CHANNELS)
            piece = tl.load(
                query + (owner * GROUP + mate)[None] * DIM + some[:, None],
                (mate < GROUP)[None] & (some < DIM)[:, None],
                0.0,
            )  # [CHANNELS, TILE]
            matrix = tl.load(
                rotated + some[None] * DIM + across[:, None],
                (some < DIM)[None] & (across < DIM)[:, None],
                0.0,
            )  # [channels, CHANNELS]
            if INTERPRETED:  # it takes a bfloat16's bits for a number
                matrix, piece = matrix.to(tl.float32), piece.to(tl.float32)
            turned = tl.dot(matrix, piece, turned, input_precision="ieee")
        most = float("inf")
        if HALVES:
            most = 65504.0 * scale * LOG2E
        _quantise(
            turned * (scale * LOG2E), mate, most * most, planes + owner * (SETS * STEPS * 2 * 32),
            factors + owner * (3 * PADDED), PADDED, ROOM, TILE, STEPS,
        )  # fmt: skip
    else:
        head, channel = place, tl.arange(0, WIDTH)
        inside = channel < DIM
        mine = tl.load(
            query + (line * GROUP + head)[None] * DIM + channel[:, None],
            (head < GROUP)[None] & inside[:, None],
            0.0,
        )  # [WIDTH, TILE]
        keys = tl.load(
            kv + slot[:, None] * (2 * DIM) + channel[None], seen[:, None] & inside[None], 0.0
        )  # [PAGE, WIDTH]
        score = tl.dot(keys, mine, input_precision="ieee") * (scale * LOG2E)
        if BIASED:
            distance = (position - (length - 1)).to(tl.float32)
            score += distance[:, None] * load_slopes(slopes, kv_head, head, GROUP)[None]
        score = tl.where(seen[:, None], score, float("-inf"))  # [PAGE, TILE]
        target = (line * PADDED + head)[None] * HELD + part * PAGE + key[:, None]
        tl.store(held + target, score, (head < PADDED)[None])
        certain = tl.full((PAGE,), CERTAIN, tl.int64) << SLOT_BITS
        note = tl.where(seen, certain | (cached * PAGE + key), newest)
        tl.store(always + line * HELD + part * PAGE + key, note)
        span = tl.arange(0, SPANS)  # of which nothing is known yet
        tl.store(counts + line * spans + span, -1, span < tl.where(part == 0, spans, 0))


@triton.jit
def _quantise(
    turned, head, most_square, planes, factors,
    PADDED: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The rotated query in whole steps, bit by bit, as `kernels.gpu.lanes` takes it."""
    tl.static_assert(PLANES == 4)  # a byte each of a word, below
    most: tl.constexpr = 2**PLANES // 2
    step = tl.maximum(tl.max(tl.abs(turned), 0), 1e-30) / (most - 0.5)  # [TILE]
    whole = tl.floor(turned * (1.0 / step)[None] + 0.5)  # [channels, TILE]
    whole = tl.minimum(tl.maximum(whole, -most), most - 1).to(tl.int32)
    words: tl.constexpr = STEPS * 128 // WORD
    # A channel's bits in a byte of a plane each, eight channels side by side in it; then, of each
    # plane, the bytes of four times eight channels.
    eighth, byte = tl.arange(0, 8)[None, None, :, None], tl.arange(0, 4)[None, :, None, None]
    bits = ((tl.reshape(whole, (words, 4, 8, TILE)) & 15) * 0x204081 & 0x01010101) << eighth
    plane = tl.arange(0, PLANES)[None, None]
    signs = tl.sum(bits, 2)[:, :, :, None] >> 8 * plane[None] & 255
    signs = tl.sum(signs << 8 * byte, 1)  # [words, TILE, PLANES]
    word, place = tl.arange(0, words)[:, None, None], head[None, :, None]
    target = planes[None, :, None] + (place // 4 * STEPS + word // 4) * (2 * 32)
    target += place % 4 * 8 + word % 4 + plane % 2 * 32 + plane // 2 * 4
    tl.store(target, signs, place < ROOM)
    both = tl.sum(tl.join(turned * turned, whole.to(tl.float32)), 0)
    size, total = tl.split(both)
    # Centres are scored with queries of float16: what these do not hold is to show.
    size = tl.where(size > most_square, float("nan"), size)
    tl.store(factors + head, step * 2, head < PADDED)
    tl.store(factors + PADDED + head, step * -total, head < PADDED)
    tl.store(factors + 2 * PADDED + head, size * (HALF_NOISE / LOG2E), head < PADDED)
