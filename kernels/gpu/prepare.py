"""Before the keys are scored: the query in the form of the codes, and the keys always read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.codes import NOISE, rotation
from kernels.gpu.codes import LEVELS, PLACES
from kernels.gpu.distance import load_slopes, slopes_of
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
    _prepare[layout.lines, 1 + HELD // PAGE](
        query, rotation(layout.head_dim, wide, query.device), cache.kv, rows.block_tables,
        rows.starts, rows.lengths, slopes_of(cache), scratch.steps, scratch.factors, scratch.held,
        scale, sinks, rows.queries, layout.kv_heads, rows.block_tables.stride(0),
        cache.kv.shape[1],
        GROUP=layout.group, PADDED=layout.padded, TILE=tile_of(layout.group),
        DIM=layout.head_dim, WIDTH=triton.next_power_of_2(layout.head_dim),
        OCTETS=layout.octets, TOGETHER=layout.together, HELD=HELD, PAGE=PAGE,
        BIASED=cache.slopes is not None,
        CHANNELS=min(CHANNELS, triton.next_power_of_2(layout.head_dim)), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sinks", "queries", "kv_heads", "table_stride", "cache_pages"])
def _prepare(
    query, rotated, kv, tables, starts, lengths, slopes, steps, factors, held,
    scale, sinks, queries, kv_heads, table_stride, cache_pages,
    GROUP: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, OCTETS: tl.constexpr, TOGETHER: tl.constexpr, HELD: tl.constexpr,
    PAGE: tl.constexpr, CHANNELS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One line: its query, or a page of the keys always read."""
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    inside = channel < DIM
    if part == 0:
        across = tl.arange(0, OCTETS * 8)
        turned = tl.zeros((TILE, OCTETS * 8), tl.float32)
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
            turned * (scale * LOG2E), head, across,
            steps + line * (8 * TOGETHER * PADDED * TOGETHER * OCTETS),
            factors + line * (3 * PADDED), PADDED, TOGETHER, OCTETS,
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
    turned, head, channel, steps, factors,
    PADDED: tl.constexpr, TOGETHER: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """The rotated query in whole steps, once for each page of a product's row."""
    step = tl.maximum(tl.max(tl.abs(turned), 1), 1e-30) / LEVELS  # [TILE]
    octet, bit = channel // 8, channel % 8
    # What a bit is worth where it stands, over -128: see `kernels.gpu.codes`.
    part = tl.where(bit % PLACES == 1, -1.0, tl.where(bit % PLACES == 0, 2.0, 4.0))[None]
    whole = tl.floor(turned / step[:, None] * part + 0.5)  # [TILE, channels]
    there = (head < PADDED)[:, None]
    columns: tl.constexpr = TOGETHER * PADDED
    deep: tl.constexpr = TOGETHER * OCTETS
    for own in tl.static_range(TOGETHER):
        for other in tl.static_range(TOGETHER):
            value = whole if own == other else tl.zeros_like(whole)
            place = (bit[None] * columns + own * PADDED + head[:, None]) * deep + other * OCTETS
            tl.store(steps + place + octet[None], value.to(tl.int8), there)
    total = tl.sum(whole / tl.abs(part) * tl.where(part < 0, -1.0, 1.0), 1) * step
    size = tl.sum(turned * turned, 1)
    tl.store(factors + head, step / 64, head < PADDED)
    tl.store(factors + PADDED + head, -total, head < PADDED)
    tl.store(factors + 2 * PADDED + head, size * (HALF_NOISE / LOG2E), head < PADDED)
