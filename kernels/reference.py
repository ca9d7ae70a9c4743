"""The specification: what each op means, written to be read, in float64 and without speed.

Here of attention to keys; `kernels.reference_tiles` has that of tiles to pages, and
`kernels.reference_sample` which keys are read. None of them is imported by a fast backend, and none
imports one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows, Segment
    from kernels.selection import Selection


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    log_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys where `mask` is True.

    Args:
        query: [rows, heads, head_dim].
        keys: [rows, heads, keys, head_dim].
        values: [rows, heads, keys, head_dim].
        mask: bool [rows, heads, keys].
        scale: factor on the scores.
        log_weight: [rows, heads, keys], log of the number of times that each key counts.
        bias: [rows, heads, keys], added to the scores.

    Returns:
        float64 output [rows, heads, head_dim] and log-sum-exp [rows, heads]; a row without keys
        gives 0 and -inf.
    """
    scores = torch.einsum("rhd,rhkd->rhk", query.double(), keys.double()) * scale
    for added in (log_weight, bias):
        if added is not None:
            scores = scores + added.double()
    scores = scores.masked_fill(~mask, -torch.inf)  # [rows, heads, keys]
    lse = scores.logsumexp(-1)  # [rows, heads]
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)
    return torch.einsum("rhk,rhkd->rhd", weights, values.double()), lse


def selected_attention(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row over its selected keys; see `kernels.attention.selected_attention`."""
    group = query.shape[1] // cache.kv_heads
    count, kv_heads, capacity = selection.indices.shape
    mask = selection.indices >= 0  # [rows, kv_heads, capacity]
    slots = rows.slots(selection.indices.clamp_min(0))  # [rows, kv_heads, capacity]
    flat = cache.kv.view(kv_heads, -1, 2, cache.head_dim)
    heads = torch.arange(kv_heads, device=slots.device)[None, :, None]
    picked = flat[heads, slots]  # [rows, kv_heads, capacity, 2, head_dim]
    picked = picked.repeat_interleave(group, dim=1)  # [rows, heads, capacity, 2, head_dim]
    keys, values = picked[..., 0, :], picked[..., 1, :]
    mask = mask.repeat_interleave(group, dim=1)
    place = selection.indices.repeat_interleave(group, dim=1)
    bias = distance_bias(cache, place, rows.lengths - 1)
    output, lse = masked_attention(query, keys, values, mask, scale, bias=bias)
    assert output.shape[0] == count and capacity == mask.shape[-1]
    if selection.log_weight is None:
        return output, lse, lse
    weights = selection.log_weight.repeat_interleave(group, dim=1)
    return *masked_attention(query, keys, values, mask, scale, weights, bias), lse


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each row over the keys that it sees; see `kernels.attention.dense_decode`."""
    table = rows.block_tables.repeat_interleave(rows.queries, dim=0)  # [rows, pages]
    flat = cache.kv[:, table].flatten(2, 3).transpose(0, 1)  # [rows, kv_heads, keys, 2, head_dim]
    flat = flat.repeat_interleave(query.shape[1] // cache.kv_heads, dim=1)
    key = torch.arange(flat.shape[2], device=query.device)
    mask = (key >= rows.starts[:, None]) & (key < rows.lengths[:, None])  # [rows, keys]
    mask = mask[:, None].expand(-1, query.shape[1], -1)
    flat = flat.masked_fill(~mask[..., None, None], 0.0)  # pages hold anything behind the last key
    bias = distance_bias(cache, key.expand(mask.shape), rows.lengths - 1)
    return masked_attention(query, flat[..., 0, :], flat[..., 1, :], mask, scale, bias=bias)


def dense_attention(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float, window: int | None
) -> Tensor:
    """Causal attention of a segment; see `kernels.attention.dense_attention`."""
    tokens, heads, head_dim = query.shape
    total = segment.start + tokens
    flat = cache.kv[:, segment.block_table].reshape(cache.kv_heads, -1, 2, head_dim)
    flat = flat[:, :total].repeat_interleave(heads // cache.kv_heads, dim=0)
    keys, values = flat[:, :, 0], flat[:, :, 1]  # [heads, keys, head_dim]
    position = segment.start + torch.arange(tokens, device=query.device)[:, None]
    key = torch.arange(total, device=query.device)
    mask = key <= position  # [tokens, keys]
    if window is not None:
        mask = mask & (position - key < window)
    output, _ = masked_attention(
        query,
        keys.expand(tokens, -1, -1, -1),
        values.expand(tokens, -1, -1, -1),
        mask[:, None].expand(-1, heads, -1),
        scale,
        bias=distance_bias(cache, key.expand(tokens, heads, -1), position[:, 0]),
    )
    return output


def distance_bias(cache: LayerCache, position: Tensor, query: Tensor) -> Tensor | None:
    """What distance adds to the scores of the keys at `position` [rows, heads, keys]; see
    `kernels.alibi`.
    """
    if cache.slopes is None:
        return None
    distance = (position - query[:, None, None]).double()
    return cache.slopes.double()[:, None] * distance
