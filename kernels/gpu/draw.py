"""Draws of unselected keys, in one program a few draws: `kernels.draws` by page, then by key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.draws import steps
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

BLOCK = 16
"""Draws of a program."""


def correction(
    scores: Tensor, lse: Tensor, left: Tensor, cache: LayerCache, rows: Rows, first: int, count: int
) -> Tensor:
    """See `kernels.draws.correction`.

    Args:
        scores: float32 [rows, kv_heads, group, keys], -inf for what is selected or not seen.
        lse: float32 [rows, kv_heads, group], log of each head's mass, the selected keys' included.
        left: float32 [rows, kv_heads, group, pages], share of it that is unselected, by page.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        first: the page that the scores begin with.
        count: draws a row and KV head.

    Returns:
        float32 [rows, heads, head_dim].
    """
    number, kv_heads, group, pages = left.shape
    whole = left.sum(-1).clamp_min(1e-30)  # [rows, kv_heads, group]
    mean = (left / whole[..., None]).mean(2)  # [rows, kv_heads, pages]
    sums = mean.double().cumsum(-1)
    total = sums[..., -1:]
    target = total * steps(count, left.device)  # [rows, kv_heads, draws]
    page = torch.searchsorted(sums, target).clamp_max_(pages - 1)
    inside = (target - (sums.gather(-1, page) - mean.gather(-1, page))).float()
    blocks = -(-count // BLOCK)
    parts = torch.empty(number, kv_heads, group, blocks, cache.head_dim, device=left.device)
    _draw[number, kv_heads, blocks](
        scores, lse, whole, page, inside, cache.kv, cache.value_mean, rows.block_tables, parts,
        rows.queries, count, first, pages, rows.block_tables.stride(0), cache.kv.shape[1],
        GROUP=group, DIM=cache.head_dim, WIDTH=triton.next_power_of_2(cache.head_dim),
        BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return (parts.sum(3) * (total[..., None] / count).float()).flatten(1, 2)


@triton.jit(do_not_specialize=["queries", "count", "first", "pages", "table_stride", "cache_pages"])
def _draw(
    scores, lse, whole, pages_drawn, insides, kv, means, tables, parts,
    queries, count, first, pages, table_stride, cache_pages,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Some draws of one row and KV head."""
    row, kv_head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    line = row * tl.num_programs(1) + kv_head
    place = block * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    page = tl.load(pages_drawn + line * count + place, there, 0)
    inside = tl.load(insides + line * count + place, there, 0.0)
    key, channel = tl.arange(0, PAGE), tl.arange(0, WIDTH)
    column = page[:, None] * PAGE + key[None]
    mean = tl.zeros((BLOCK, PAGE), tl.float32)
    for head in tl.static_range(GROUP):
        at = line * GROUP + head
        score = tl.load(scores + at * (pages * PAGE) + column)
        mean += tl.exp(score - tl.load(lse + at)) / tl.load(whole + at)
    mean = tl.where(mean == mean, mean / GROUP, 0.0)
    # The first key that the cumulated mass reaches; rounding must not lead past the last.
    reached = (tl.cumsum(mean, 1) >= inside[:, None]) & (mean > 0)
    found = tl.min(tl.where(reached, key[None], PAGE), 1)
    found = tl.where(found < PAGE, found, tl.max(tl.where(mean > 0, key[None], -1), 1))
    drawn = (found >= 0) & there
    one = key[None] == found[:, None]  # [BLOCK, PAGE]
    chance = tl.sum(tl.where(one, mean, 0.0), 1)
    found = tl.maximum(found, 0)
    cached = tl.load(tables + (row // queries) * table_stride + first + page, there, 0)
    cached += kv_head.to(tl.int64) * cache_pages
    loaded = drawn[:, None] & (channel < DIM)[None]
    slot = cached * PAGE + found
    value = tl.load(kv + slot[:, None] * (2 * DIM) + DIM + channel[None], loaded, 0.0)
    off = value.to(tl.float32) - tl.load(
        means + cached[:, None] * DIM + channel[None], loaded, 0.0
    ).to(tl.float32)  # [BLOCK, WIDTH]
    for head in tl.static_range(GROUP):
        at = line * GROUP + head
        score = tl.load(scores + at * (pages * PAGE) + column)
        own = tl.exp(score - tl.load(lse + at)) / tl.load(whole + at)
        weight = tl.sum(tl.where(one, own, 0.0), 1) / tl.where(chance > 0, chance, 1.0)
        weight = tl.where(drawn, weight, 0.0)
        target = parts + (at * tl.num_programs(2) + block) * DIM + channel
        tl.store(target, tl.sum(weight[:, None] * off, 0), channel < DIM)
