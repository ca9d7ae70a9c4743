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
from kernels.gpu.lanes import PLANES, WORD
from kernels.gpu.launch import tile_of
from kernels.gpu.layout import HELD
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch

CHANNELS = 64
"""Channels that are rotated at once."""
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
    """Rotate and quantise the queries, and score the sinks and the recent window exactly."""
    wide = query.dtype if query.dtype != torch.float64 else torch.float32
    overlaps = overlap.possible(query.device)
    _prepare[layout.lines, 1 + HELD // PAGE](
        query, rotation(layout.head_dim, wide, query.device), cache.kv, rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.planes, scratch.factors, scratch.held,
        scale, sinks, rows.queries, layout.kv_heads, rows.block_tables.stride(0),
        cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, TILE=tile_of(layout.group),
        DIM=layout.head_dim, WIDTH=triton.next_power_of_2(layout.head_dim),
        STEPS=layout.steps, SETS=layout.sets, HELD=HELD, PAGE=PAGE,
        CHANNELS=min(CHANNELS, triton.next_power_of_2(layout.head_dim)),
        BIASED=cache.slopes is not None, OVERLAP=overlaps, launch_pdl=overlaps, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sinks", "queries", "kv_heads", "table_stride", "cache_pages"])
def _prepare(
    query, rotated, kv, tables, starts, lengths, slopes, planes, factors, held,
    scale, sinks, queries, kv_heads, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, SETS: tl.constexpr, HELD: tl.constexpr,
    PAGE: tl.constexpr, CHANNELS: tl.constexpr, BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One line: its query, or a page of the keys always read."""
    overlap.begin(OVERLAP)
    overlap.wait(OVERLAP)
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    inside = channel < DIM
    if part == 0:
        across = tl.arange(0, STEPS * 128)
        turned = tl.zeros((TILE, STEPS * 128), tl.float32)
        for first in tl.static_range(0, WIDTH, CHANNELS):
            some = first + tl.arange(0, CHANNELS)
            piece = tl.load(
                query + (line * GROUP + head)[:, None] * DIM + some[None],
                (head < GROUP)[:, None] & (some < DIM)[None],
                0.0,
            )  # [TILE, CHANNELS]
            matrix = tl.load(
                rotated + some[:, None] * DIM + across[None],
                (some < DIM)[:, None] & (across < DIM)[None],
                0.0,
            )  # [CHANNELS, channels]
            turned = tl.dot(piece, matrix, turned, input_precision="ieee")
        _quantise(
            turned * (scale * LOG2E), head, planes + line * (SETS * STEPS * 2 * 32),
            factors + line * (3 * PADDED), PADDED, TILE, STEPS,
        )  # fmt: skip
    else:
        mine = tl.load(
            query + (line * GROUP + head)[:, None] * DIM + channel[None],
            (head < GROUP)[:, None] & inside[None],
            0.0,
        )  # [TILE, WIDTH]
        row, kv_head = line // kv_heads, line % kv_heads
        start, length = tl.load(starts + row), tl.load(lengths + row)
        stop = tl.maximum(length // PAGE - 1, 0)  # page of the recent window
        key = tl.arange(0, PAGE)
        page = tl.where(part == 1, 0, stop + part - 2)
        position = page * PAGE + key
        end = tl.where(part == 1, tl.minimum(stop * PAGE, sinks), length)
        seen = (position >= start) & (position < end)
        table = tables + (row // queries) * table_stride
        cached = tl.load(table + position // PAGE, seen, 0)
        slot = (kv_head * cache_pages + cached) * PAGE + key
        keys = tl.load(
            kv + slot[:, None] * (2 * DIM) + channel[None], seen[:, None] & inside[None], 0.0
        )  # [PAGE, WIDTH]
        score = tl.dot(mine, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        if BIASED:
            distance = (position - (length - 1)).to(tl.float32)
            score += load_slopes(slopes, kv_head, head, GROUP)[:, None] * distance[None]
        score = tl.where(seen[None], score, float("-inf"))  # [TILE, PAGE]
        place = (line * PADDED + head)[:, None] * HELD + (part - 1) * PAGE + key[None]
        tl.store(held + place, score, (head < PADDED)[:, None])


@triton.jit
def _quantise(
    turned, head, planes, factors,
    PADDED: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The rotated query in whole steps, bit by bit, as `kernels.gpu.lanes` takes it."""
    most: tl.constexpr = 2**PLANES // 2
    step = tl.maximum(tl.max(tl.abs(turned), 1), 1e-30) / (most - 0.5)  # [TILE]
    whole = tl.floor(turned / step[:, None] + 0.5)  # [TILE, channels]
    whole = tl.minimum(tl.maximum(whole, -most), most - 1).to(tl.int32)
    words: tl.constexpr = STEPS * 128 // WORD
    word, bit = tl.arange(0, words)[None], tl.arange(0, WORD)[None, None]
    place = ((head // 4)[:, None] * STEPS + word // 4) * (2 * 32)
    place += (head % 4)[:, None] * 8 + word % 4
    for plane in tl.static_range(PLANES):
        signs = tl.reshape((whole >> plane) & 1, (TILE, words, WORD))
        signs = tl.sum(signs << bit, 2)  # [TILE, words]
        target = planes + place + (plane % 2 * 32 + plane // 2 * 4)
        tl.store(target, signs, (head < max(PADDED, 4))[:, None])
    size = tl.sum(turned * turned, 1)
    tl.store(factors + head, step * 2, head < PADDED)
    tl.store(factors + PADDED + head, step * -tl.sum(whole, 1).to(tl.float32), head < PADDED)
    tl.store(factors + 2 * PADDED + head, size * (HALF_NOISE / LOG2E), head < PADDED)
