"""Attention of rows over selected keys, in torch's operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.alibi import bias_at
from kernels.page import PAGE
from kernels.softmax import average, bias_of, plain_attention, score, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection

# Gathers are cut into pieces of this many bytes: enough to fill the cores, small enough that the
# copies of a long prompt's rows do not double the process.
GATHER_BYTES = 64 << 20
GPU_GATHER_BYTES = 2 << 30  # more memory, and a launch costs as much as many rows


def at_once(device: torch.device, each: int) -> int:
    """How many rows of `each` bytes make a piece."""
    return max(1, (GATHER_BYTES if device.type == "cpu" else GPU_GATHER_BYTES) // each)


def selected_attention(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.attention.selected_attention`."""
    count, kv_heads, capacity = selection.indices.shape
    heads, head_dim = query.shape[1:]
    if capacity == 0:
        lse = query.new_full((count, heads), -torch.inf, dtype=wide(query.dtype))
        return torch.zeros_like(query), lse, lse
    flat = cache.kv.view(-1, 2 * head_dim)
    place = torch.arange(capacity, device=query.device)
    mask = place < selection.counts[..., None]  # [rows, kv_heads, capacity]
    grouped = query.view(count, kv_heads, -1, head_dim)  # [rows, kv_heads, group, head_dim]
    weights = selection.log_weight
    outputs, lses, owns = [], [], []
    step = at_once(query.device, kv_heads * capacity * flat.shape[1] * flat.itemsize)
    for part, piece in rows.pieces(step):
        slots = piece.slots(selection.indices[part].clamp_min(0))  # [rows, kv_heads, capacity]
        slots = slots + head_offsets(cache, slots.device)
        picked = flat.index_select(0, slots.flatten())
        picked = picked.view(-1, kv_heads, capacity, 2, head_dim)
        pair, seen = (picked[..., 0, :], picked[..., 1, :]), mask[part][:, :, None]
        if weights is None and cache.slopes is None:
            bias = None if bool(seen.all()) else bias_of(seen, query.dtype)
            output, lse = plain_attention(grouped[part], *pair, bias, scale)
            own = lse
        else:
            # What is added to the scores a fused kernel would round to their dtype.
            precise = wide(query.dtype)
            scores = score(grouped[part].to(precise), pair[0].to(precise), scale)
            if cache.slopes is not None:
                scores.add_(bias_at(cache, selection.indices[part], piece.lengths - 1))
            scores.masked_fill_(~seen, -torch.inf)
            own = scores.logsumexp(-1)
            if weights is not None:
                scores.add_(weights[part][:, :, None])
            output, lse = average(scores, pair[1])
        outputs.append(output)
        lses.append(lse)
        owns.append(own)
    empty = selection.counts.eq(0)[:, :, None]  # [rows, kv_heads, 1]
    # A softmax over nothing is nan; the op promises 0 and -inf.
    output = torch.cat(outputs).masked_fill(empty[..., None], 0.0)
    lse, own = (
        torch.cat(parts).masked_fill(empty, -torch.inf).reshape(count, heads)
        for parts in (lses, owns)
    )
    return output.reshape(count, heads, head_dim), lse, own


def head_offsets(cache: LayerCache, device: torch.device) -> Tensor:
    """int64 [kv_heads, 1], where each head's slots begin in the cache seen as one list of rows."""
    slots = cache.kv.shape[1] * PAGE
    return torch.arange(0, cache.kv_heads * slots, slots, device=device)[:, None]
