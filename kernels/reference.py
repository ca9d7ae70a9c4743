"""The specification: what each op means, written to be read, in float64 and without speed.

Nothing here is imported by a fast backend, and nothing here imports one.
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
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys where `mask` is True.

    Args:
        query: [rows, heads, head_dim].
        keys: [rows, heads, keys, head_dim].
        values: [rows, heads, keys, head_dim].
        mask: bool [rows, heads, keys].
        scale: factor on the scores.
        log_weight: [rows, heads, keys], log of the number of times that each key counts.

    Returns:
        float64 output [rows, heads, head_dim] and log-sum-exp [rows, heads]; a row without keys
        gives 0 and -inf.
    """
    scores = torch.einsum("rhd,rhkd->rhk", query.double(), keys.double()) * scale
    if log_weight is not None:
        scores = scores + log_weight.double()
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
    output, lse = masked_attention(query, keys, values, mask, scale)
    assert output.shape[0] == count and capacity == mask.shape[-1]
    if selection.log_weight is None:
        return output, lse, lse
    weights = selection.log_weight.repeat_interleave(group, dim=1)
    return *masked_attention(query, keys, values, mask, scale, weights), lse


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
    return masked_attention(query, flat[..., 0, :], flat[..., 1, :], mask, scale)


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
    )
    return output


def wanted_keys(
    share: Tensor,
    held: float,
    always: int,
    coverage: float,
    least: int,
    most: int,
    worth: float,
    sample: int = 0,
) -> int:
    """The budget of one row and KV head: top-p between two top-k bounds.

    Args:
        share: [keys], estimated share of the row's attention mass, of the keys that may be drawn.
        held: share of the keys that are always read.
        always: how many these are.
        coverage: share of the mass to reach.
        least: fewest keys, `always` included.
        most: most keys, `always` included.
        worth: share under which a key is read only to make up `least`.
        sample: fewest keys, `always` not included, whatever `most` says.

    Returns:
        How many of the keys are to be read.
    """
    wanted = 0
    for one in sorted(share.tolist(), reverse=True):
        enough = held >= coverage or one < worth
        if always + wanted >= most or (enough and always + wanted >= least):
            break
        held += one
        wanted += 1
    return min(max(wanted, sample), len(share))


def draw(share: Tensor, number: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The sample of one row and KV head: priority sampling; see `kernels.sample`.

    Args:
        share: [keys], of those that may be drawn.
        number: [keys], in (0, 1].
        wanted: how many; at most all of them.

    Returns:
        int64 [wanted], which keys, ascending; and float64 [wanted], how many keys each stands for.
    """
    priority = [float(w) / float(u) for w, u in zip(share, number, strict=True)]
    order = sorted(range(len(priority)), key=lambda i: (-priority[i], i))
    threshold = priority[order[wanted]] if wanted < len(order) else 0.0
    drawn = sorted(order[:wanted])
    stands = [1 / min(1.0, float(share[i]) / threshold) if threshold else 1.0 for i in drawn]
    return torch.tensor(drawn, dtype=torch.int64), torch.tensor(stands, dtype=torch.float64)
