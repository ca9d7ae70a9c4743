"""Attention over all keys, or a window of them: torch's operations, tuned for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kernels.alibi import bias_at
from kernels.page import PAGE
from kernels.softmax import merge, plain_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kernels.cache import LayerCache, Rows, Segment

PIECE = 16384
"""Keys that a token sees at once: longer copies, where pages lie apart, cost more a key."""
BIASED = 256
"""Tokens that attend at once where distance counts: distances within them are rounded little."""
# Of a GPU's kernels for contiguous keys the first that can; on one H200 at 32K tokens the first two
# make 592 and 347 TFLOP/s.
FASTEST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.attention.dense_decode`."""
    count, heads, head_dim = query.shape
    grouped = query.view(count, 1, cache.kv_heads, -1, head_dim)
    outputs, lses = [], []
    spans = zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
    for row, (start, stop) in enumerate(spans):
        table = rows.block_tables[row // rows.queries]
        if start == 0:
            blocks = list(_pieces(cache, table, stop))
        else:
            blocks = [_gather(cache, table, start, stop)]
        parts, first = [], start
        for keys, values in blocks:
            bias = None
            if cache.slopes is not None:
                bias = _falling(cache, first, keys.shape[2], stop - 1)
            parts.append(plain_attention(grouped[row], keys, values, bias, scale))
            first += keys.shape[2]
        output, lse = merge(parts)
        outputs.append(output.reshape(heads, head_dim))
        lses.append(lse.reshape(heads))
    return torch.stack(outputs).to(query.dtype), torch.stack(lses)


def dense_attention(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float, window: int | None
) -> Tensor:
    """See `kernels.attention.dense_attention`."""
    total = segment.start + segment.tokens
    if cache.slopes is not None:
        return _biased_attention(query, cache, segment, scale, window)
    first = 0 if window is None else max(0, segment.start + 1 - window)
    if query.device.type != "cpu" or first > 0 or (window is not None and total > window):
        return _gathered_attention(query, cache, segment, scale, first, window)
    tokens, heads, head_dim = query.shape
    kv_heads = cache.kv_heads
    # Every token sees all the keys before the segment, so the group's heads and the tokens are
    # query rows of one unmasked call a KV head.
    stacked = query.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    stacked = stacked.reshape(1, kv_heads, -1, head_dim)  # [1, kv_heads, group * tokens, head_dim]
    parts = [
        plain_attention(stacked, keys, values, None, scale)
        for keys, values in _pieces(cache, segment.block_table, segment.start)
    ]
    keys, values = _gather(cache, segment.block_table, segment.start, total, heads // kv_heads)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(0, 1)[None], keys, values, 0.0, True, scale=scale
    )
    parts.append((output.reshape(stacked.shape), lse.reshape(1, kv_heads, -1)))
    merged = merge(parts)[0].view(kv_heads, -1, tokens, head_dim)
    return merged.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim).to(query.dtype)


def _biased_attention(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float, window: int | None
) -> Tensor:
    """Dense attention where scores fall with distance: a piece of the tokens after the other.

    What is added to the scores of keys that all of a piece see is the same for all of them but for
    a constant, of which a softmax knows nothing: it is counted from the piece's last token.
    """
    group, table, outputs = query.shape[1] // cache.kv_heads, segment.block_table, []
    for start in range(segment.start, segment.start + segment.tokens, BIASED):
        stop = min(start + BIASED, segment.start + segment.tokens)
        mine = query[start - segment.start : stop - segment.start].transpose(0, 1)[None]
        parts, first = [], 0
        for keys, values in _pieces(cache, table, start) if window is None else ():
            bias = _falling(cache, first, keys.shape[2], stop - 1).view(1, -1, 1, keys.shape[2])
            if group > 1:
                keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
            parts.append(plain_attention(mine, keys, values, bias, scale))
            first += keys.shape[2]
        early = start if window is None else max(0, start + 1 - window)
        bias = _falling(cache, early, stop - early, stop - 1).view(1, -1, 1, stop - early)
        seen = _sees(segment, start, stop, early, window)
        bias = bias.masked_fill(~seen, -torch.inf)  # [1, heads, tokens, keys]
        own = _gather(cache, table, early, stop, group)
        parts.append(plain_attention(mine, *own, bias, scale))
        outputs.append(merge(parts)[0][0].transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def _gathered_attention(
    query: Tensor,
    cache: LayerCache,
    segment: Segment,
    scale: float,
    first: int,
    window: int | None,
) -> Tensor:
    """Dense attention over a contiguous copy of the keys from `first` on."""
    tokens, heads, _ = query.shape
    stop = segment.start + tokens
    keys, values = _gather(cache, segment.block_table, first, stop, heads // cache.kv_heads)
    mask: Tensor | None
    if window is None:
        # From the start on there is a faster kernel.
        mask = None if segment.start == 0 else causal_lower_right(tokens, stop)
    else:
        mask = _sees(segment, segment.start, stop, first, window)
    with sdpa_kernel(list(FASTEST), set_priority=True):
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
    return output[0].transpose(0, 1)


def _pieces(cache: LayerCache, table: Tensor, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values before position `stop`, in pieces [1, kv_heads, keys, head_dim].

    They are cut by position alone, so that sums are rounded alike wherever the pages lie.
    """
    for first in range(0, stop, PIECE):
        last = min(first + PIECE, stop)
        pages = table[None, first // PAGE : -(-last // PAGE)]
        kept = cache.of_pages(cache.kv, pages).flatten(1, 2)
        keys, values = kept[None, :, : last - first].unbind(3)
        yield keys, values


def _gather(
    cache: LayerCache, table: Tensor, start: int, stop: int, group: int = 1
) -> tuple[Tensor, Tensor]:
    """A copy of the keys and values at positions `start` to `stop`, for each head of a group.

    Returns:
        [1, kv_heads * group, keys, head_dim] each.
    """
    position = torch.arange(start, stop, device=table.device)
    slots = table[position // PAGE] * PAGE + position % PAGE  # [keys]
    copy = cache.kv.view(cache.kv_heads, -1, 2, cache.head_dim).index_select(1, slots)
    if group > 1:
        copy = copy.repeat_interleave(group, dim=0)
    keys, values = copy[None].unbind(3)
    return keys, values


def _sees(segment: Segment, start: int, stop: int, first: int, window: int | None) -> Tensor:
    """Which keys from `first` on the tokens from `start` to `stop` see: bool [tokens, keys]."""
    device = segment.block_table.device
    position = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(first, stop, device=device)
    seen = key <= position
    return seen if window is None else seen & (position - key < window)


def _falling(cache: LayerCache, first: int, keys: int, query: int) -> Tensor:
    """What distance from position `query` adds to the scores of `keys` keys from `first` on.

    Returns:
        [1, kv_heads, group, keys].
    """
    position = torch.arange(first, first + keys, device=cache.kv.device)
    return bias_at(cache, position[None, None], position.new_tensor([query]))
