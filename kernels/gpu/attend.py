"""Attention of single query rows over the paged cache: over selected keys, or over all.

Split over the keys and joined by the parts' log-sum-exps (FlashDecoding; Dao et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import splits_for, tile_of
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection

BLOCK = 64
"""Keys that a program reads at once."""


def selected_attention(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.attention.selected_attention`."""
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    return _attend(query, cache, rows, scale, indices.shape[-1], (indices, counts))


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.attention.dense_decode`."""
    return _attend(query, cache, rows, scale, rows.block_tables.shape[1] * PAGE, None)


def _attend(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float,
    keys: int, listed: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count, heads, head_dim = query.shape
    kv_heads = cache.kv_heads
    blocks = max(1, -(-keys // BLOCK))
    splits = splits_for(count * kv_heads, blocks)
    outputs = torch.empty(count, heads, splits, head_dim, device=query.device)
    lses = torch.empty(count, heads, splits, device=query.device)
    indices, counts = listed if listed is not None else (rows.lengths, rows.starts)
    width = triton.next_power_of_2(head_dim)
    _part[count, kv_heads, splits](
        query.contiguous(), cache.kv, rows.block_tables, indices, counts, outputs, lses, scale,
        rows.queries, keys, rows.block_tables.stride(0), cache.kv.shape[1], -(-blocks // splits),
        GROUP=heads // kv_heads, TILE=tile_of(heads // kv_heads), DIM=head_dim, WIDTH=width,
        LISTED=listed is not None, BLOCK=BLOCK, PAGE=PAGE, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits == 1:
        return outputs[:, :, 0].to(query.dtype), lses[:, :, 0]
    output = torch.empty_like(query)
    lse = torch.empty(count, heads, device=query.device)
    _join[count, heads](
        outputs, lses, output, lse, splits,
        SPLITS=triton.next_power_of_2(splits), DIM=head_dim, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return output, lse


@triton.jit
def _part(
    query, kv, tables, indices, counts, outputs, lses, scale,
    queries, capacity, table_stride, cache_pages, blocks,
    GROUP: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One row and KV head over a split of its keys.

    LISTED: of those in `indices`, of which there are `counts`. Else of all that the row sees:
    `counts` to `indices`.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    line = row * tl.num_programs(1) + kv_head
    head, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    wide = (head < GROUP)[:, None] & (channel < DIM)[None]
    own = tl.load(query + (line * GROUP + head[:, None]) * DIM + channel[None], wide, 0.0)
    table = tables + (row // queries) * table_stride
    base = kv_head.to(tl.int64) * cache_pages * PAGE
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    if LISTED:
        begin, end = 0, tl.load(counts + line).to(tl.int32)
    else:
        begin, end = tl.load(counts + row).to(tl.int32), tl.load(indices + row).to(tl.int32)
    low = tl.maximum(split * blocks * BLOCK, begin // BLOCK * BLOCK)
    for block in range(low, tl.minimum((split + 1) * blocks * BLOCK, end), BLOCK):
        place = block + tl.arange(0, BLOCK)
        seen = (place >= begin) & (place < end)
        if LISTED:
            position = tl.load(indices + line * capacity + place, seen, 0)
        else:
            position = place.to(tl.int64)
        page = tl.load(table + position // PAGE, seen, 0)
        slot = base + page * PAGE + position % PAGE
        data = kv + slot[:, None] * (2 * DIM) + channel[None]
        there = seen[:, None] & (channel < DIM)[None]
        keys = tl.load(data, there, 0.0)  # [BLOCK, WIDTH]
        values = tl.load(data + DIM, there, 0.0)
        score = tl.dot(own, tl.trans(keys), input_precision="ieee") * scale  # [TILE, BLOCK]
        score = tl.where(seen[None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(peak - safe)
        mass = tl.exp(score - safe[:, None])
        total = total * shrink + tl.sum(mass, 1)
        sums = tl.dot(mass.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        peak = higher
    output = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(peak == float("-inf"), 0.0, peak) + tl.log(total)
    target = (line * GROUP + head) * tl.num_programs(2) + split
    tl.store(lses + target, lse, head < GROUP)
    tl.store(outputs + target[:, None] * DIM + channel[None], output, wide)


@triton.jit
def _join(
    outputs, lses, output, lse, splits,
    SPLITS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head, weighted with their masses."""
    line = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    part = tl.load(lses + line * splits + split, split < splits, float("-inf"))
    peak = tl.max(part, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.exp(part - peak)
    total = tl.sum(mass, 0)
    data = tl.load(
        outputs + (line * splits + split[:, None]) * DIM + channel[None],
        (split < splits)[:, None] & (channel < DIM)[None],
        0.0,
    )  # [SPLITS, WIDTH]
    mean = tl.sum(data * mass[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + line * DIM + channel, mean.to(output.dtype.element_ty), channel < DIM)
    tl.store(lse + line, peak + tl.log(total))
