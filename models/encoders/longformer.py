"""Longformer's attention (Beltagy et al. 2020, "Longformer").

A token sees half a window on either side and the global tokens, by its own projections. A global
token sees all, by projections of its own: of such rows there are few, and they attend densely.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.patterns.expression import Intersection, Union
from kernels.patterns.pattern import Pattern
from kernels.patterns.spans import Spans
from kernels.patterns.window import Window
from models.encoders.sparse import Part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kernels.patterns.expression import Expression
    from models.encoders.sparse import Plan
    from models.encoders.texts import Shape


@lru_cache(maxsize=64)
def plan(window: int, heads: int, shape: Shape, device: torch.device) -> Plan:
    """Where the tokens of texts of one shape look, but for global ones.

    `attention_window` w is w / 2 on either side, what `window:w@bidirectional` is, too.
    """
    expression: Expression = Window(window)
    if shape.global_tokens:
        expression = Union((expression, Spans.of(shape.global_tokens)))
    if shape.spans:
        expression = Intersection((expression, Spans(shape.spans)))
    lists = Pattern(expression, causal=False).tiles(0, shape.tokens, shape.tokens, "cpu", heads)
    return (Part(lists.to(device)),)


def global_rows(
    hidden: Tensor,
    places: Tensor,
    shape: Shape,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    heads: int,
) -> Tensor:
    """What global tokens gather from all others.

    Where they are few, no token's global key or value is computed. With W and b the weight and the
    bias of a head's keys, q (W h + b) is (W^T q) h and a number that is the same for all h, which a
    softmax does not see; and a mean of V h + c is V applied to the mean of h, and c.

    Args:
        hidden: [tokens, hidden_size], the layer's input.
        places: int64 [global tokens], where they stand.
        shape: the text's.
        query: their projection.
        key: that of all tokens for them.
        value: the same.
        heads: how many there are.

    Returns:
        [global tokens, hidden_size].
    """
    mine = query(hidden[places]).view(len(places), heads, -1).transpose(0, 1)
    mine = mine * mine.shape[2] ** -0.5  # [heads, global tokens, head_dim]
    mask = _mask(shape, hidden.device)
    if len(places) >= mine.shape[2]:
        keys, values = (
            part(hidden).view(len(hidden), heads, -1).transpose(0, 1) for part in (key, value)
        )
        output = F.scaled_dot_product_attention(
            mine[None], keys[None], values[None], attn_mask=mask, scale=1.0
        )[0]
    else:
        width = hidden.shape[1]
        folded = mine @ key.weight.view(heads, -1, width)  # [heads, global tokens, hidden_size]
        scores = (folded.flatten(0, 1) @ hidden.T).to(
            torch.promote_types(hidden.dtype, torch.float32)
        )
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(-1).to(hidden.dtype) @ hidden  # [heads * global tokens, hidden_size]
        output = mixed.view(heads, -1, width) @ value.weight.view(heads, -1, width).mT
        output = output + value.bias.view(heads, 1, -1)
    return output.transpose(0, 1).flatten(1)


def _mask(shape: Shape, device: torch.device) -> Tensor | None:
    """bool [1, tokens], what is no padding."""
    if not shape.spans:
        return None
    mask = torch.zeros(1, shape.tokens, dtype=torch.bool, device=device)
    for begin, end in shape.spans:
        mask[:, begin:end] = True
    return mask
