"""Exact scores: of all keys, or of keys at given positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.alibi import bias_at
from kernels.cache import neighbours
from kernels.page import PAGE
from kernels.softmax import prescaled, wide
from kernels.torch_selected import head_offsets

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


@dataclass(frozen=True, slots=True)
class Scored:
    """Exact scores of every key that some rows see."""

    position: Tensor  # int64 [rows, 1, keys]  ascending
    scores: Tensor  # [rows, kv_heads, group, keys]  -inf where not visible


def score_every_key(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> Scored:
    """Exact scores of every visible key; a sequence's keys are read once for all its rows.

    A query wider than the cache has its products computed in its own dtype.
    """
    query, scale = prescaled(query, scale)
    count, heads, head_dim = query.shape
    kv_heads, queries = cache.kv_heads, rows.queries
    first = rows.starts.view(-1, queries).amin(1) // PAGE  # [sequences]
    last = -(-rows.lengths.view(-1, queries).amax(1) // PAGE)  # [sequences]
    width = int((last - first).max()) * PAGE
    offset = torch.arange(width, device=query.device)
    position = (first.repeat_interleave(queries)[:, None] * PAGE + offset)[:, None]
    visible = sees(position, rows)  # [rows, 1, width]
    scores = query.new_empty(count, kv_heads, heads // kv_heads, width, dtype=wide(query.dtype))
    for number, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        part = slice(number * queries, (number + 1) * queries)
        keys = keys_of_pages(cache, rows.block_tables[number, low:high])
        grouped = query[part].view(queries, kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
        for head in range(kv_heads):  # one product over them all would copy the keys first
            product = grouped[head] @ keys[head].to(query.dtype).T  # [queries * group, keys]
            target = scores[part, head, :, : keys.shape[1]]  # [queries, group, keys]
            target.copy_(product.view(target.shape)).mul_(scale)
    if cache.slopes is not None:
        scores.add_(bias_at(cache, position, rows.lengths - 1))
    scores.masked_fill_(~visible[:, :, None], -torch.inf)
    return Scored(position, scores)


def keys_of_pages(cache: LayerCache, table: Tensor) -> Tensor:
    """The keys of physical pages `table` [pages], in place where they are neighbours.

    Returns:
        [kv_heads, pages * 64, head_dim].
    """
    start = neighbours(table)
    if start is None:
        return cache.kv[:, table, :, 0].flatten(1, 2)
    run = cache.kv[:, start : start + table.shape[0]]
    return run.view(cache.kv_heads, -1, 2, cache.head_dim)[:, :, 0]


def scores_at(
    query: Tensor, cache: LayerCache, rows: Rows, position: Tensor, scale: float
) -> Tensor:
    """Exact scores of the keys at `position` [rows, kv_heads, n]: [rows, kv_heads, group, n].

    Keys that are not there get some finite-or-not score; the caller masks them.
    """
    count, kv_heads, wanted = position.shape
    if rows.queries * wanted > int(rows.lengths.max()):
        # The rows of a sequence share most of these keys: one product with all of them is cheaper.
        scored = score_every_key(query, cache, rows, scale)
        place = (position - scored.position[..., :1]).clamp(0, scored.scores.shape[-1] - 1)
        group = query.shape[1] // kv_heads
        return scored.scores.gather(-1, place[:, :, None].expand(-1, -1, group, -1))
    query, scale = prescaled(query, scale)
    last = rows.block_tables.shape[1] * PAGE - 1
    slot = rows.slots(position.clamp(0, last)) + head_offsets(cache, query.device)
    # The cache seen as rows of head_dim numbers, a key at each even row: one copy, keys alone.
    keys = cache.kv.view(-1, cache.head_dim).index_select(0, slot.flatten() * 2)
    keys = keys.view(count * kv_heads, wanted, -1)
    grouped = query.view(count * kv_heads, -1, cache.head_dim)
    # Keys first: the other way round is twice as slow on a CPU in bfloat16.
    product = torch.bmm(keys, grouped.transpose(1, 2)).transpose(1, 2).contiguous()
    scores = (product.to(wide(query.dtype)) * scale).view(count, kv_heads, -1, wanted)
    if cache.slopes is not None:
        scores.add_(bias_at(cache, position, rows.lengths - 1))
    return scores


def recent_positions(rows: Rows, kv_heads: int) -> Tensor:
    """Positions of the recent window's two pages: [rows, kv_heads, 2 * 64]."""
    offset = torch.arange(2 * PAGE, device=rows.lengths.device)
    position = rows.recent_page[:, None, None] * PAGE + offset
    return position.expand(-1, kv_heads, -1)


def sees(position: Tensor, rows: Rows) -> Tensor:
    """Which of `position` [rows, ..., keys] their rows may see."""
    start, stop = rows.starts[:, None, None], rows.lengths[:, None, None]
    return (position >= start) & (position < stop)
