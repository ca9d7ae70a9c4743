"""Softmax attention in torch's operations, whole and in parts of the keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and log-sum-exps of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


def prescaled(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The query times a power of two near `scale`, which is exact, and what is left of the scale.

    Products of unscaled queries and keys can leave float16's range where their scores do not.
    """
    power = 2.0 ** math.floor(math.log2(scale))
    return query * power, scale / power


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its log-sum-exp.

    Args:
        query: [batch, kv_heads, queries, head_dim].
        keys: [batch, kv_heads, keys, head_dim].
        values: [batch, kv_heads, keys, head_dim].
        bias: of the query's dtype or float32, broadcast to [batch, kv_heads, queries, keys], or
            None; added to the scores. A row that sees nothing gives what is no number.
        scale: factor on the scores.

    Returns:
        [batch, kv_heads, queries, head_dim] and [batch, kv_heads, queries] (wide).
    """
    if query.device.type == "cpu":
        if bias is not None:
            bias = bias.expand(-1, -1, query.shape[2], -1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=bias, scale=scale
        )
        return output, lse
    # Scores are kept as exact as that function keeps them.
    precise = wide(query.dtype)
    scores = score(query.to(precise), keys.to(precise), scale)
    return average(scores if bias is None else scores + bias, values)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores: 0, and -inf where the mask is False."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def score(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[batch, kv_heads, queries, keys] (wide); see `plain_attention`."""
    small, left = prescaled(query, scale)
    return (small @ keys.transpose(-1, -2)).to(wide(query.dtype)) * left


def average(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The values' mean by e ** score, and the scores' log-sum-exp."""
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join partial attentions by their log-sum-exps (FlashDecoding's reduction)."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])  # [parts, 1, kv_heads, queries]
    weights = lses.softmax(0)[..., None]  # [parts, 1, kv_heads, queries, 1]
    outputs = torch.stack([output.to(weights.dtype) for output, _ in parts])
    return outputs.mul_(weights).sum(0), lses.logsumexp(0)
