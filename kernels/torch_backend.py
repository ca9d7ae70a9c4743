"""The ops of `kernels.attention` in torch: tuned for a CPU, correct on any device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kernels.alibi import bias_at
from kernels.cache import Segment
from kernels.page import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection

# Gathers are cut into pieces of this many bytes: enough to fill the cores, small enough that the
# copies of a long prompt's rows do not double the process.
GATHER_BYTES = 64 << 20
GPU_GATHER_BYTES = 2 << 30  # more memory, and a launch costs as much as many rows
# A run of neighbouring pages at least this long is read in place; shorter ones are gathered
# together first, since each call costs as much as reading a few pages.
RUN_PAGES = 16
GATHER_PAGES = 128
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


def at_once(device: torch.device, each: int) -> int:
    """How many rows of `each` bytes make a piece."""
    return max(1, (GATHER_BYTES if device.type == "cpu" else GPU_GATHER_BYTES) // each)


def scan_bytes(heads: int, keys: int) -> int:
    """Bytes that the scores of one row's keys take, and what is ranked of them."""
    return 8 * heads * keys


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and log-sum-exps of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


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
            scores = _scores(grouped[part].to(precise), pair[0].to(precise), scale)
            if cache.slopes is not None:
                scores.add_(bias_at(cache, selection.indices[part], piece.lengths - 1))
            scores.masked_fill_(~seen, -torch.inf)
            own = scores.logsumexp(-1)
            if weights is not None:
                scores.add_(weights[part][:, :, None])
            output, lse = _average(scores, pair[1])
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


def prescaled(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The query times a power of two near `scale`, which is exact, and what is left of the scale.

    Products of unscaled queries and keys can leave float16's range where their scores do not.
    """
    power = 2.0 ** math.floor(math.log2(scale))
    return query * power, scale / power


def head_offsets(cache: LayerCache, device: torch.device) -> Tensor:
    """int64 [kv_heads, 1], where each head's slots begin in the cache seen as one list of rows."""
    slots = cache.kv.shape[1] * PAGE
    return torch.arange(0, cache.kv_heads * slots, slots, device=device)[:, None]


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.attention.dense_decode`."""
    count, heads, head_dim = query.shape
    grouped = query.view(count, 1, cache.kv_heads, -1, head_dim)
    outputs, lses = [], []
    spans = zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
    for row, (start, stop) in enumerate(spans):
        table = rows.block_tables[row // rows.queries, : -(-stop // PAGE)].tolist()
        segment = Segment.of(table, stop - 1, 1, query.device)
        if start == 0:
            blocks = list(_key_blocks(cache, segment, stop))
        else:
            blocks = [_split(_gather(cache, segment, start, stop))]
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
        for keys, values in _key_blocks(cache, segment, segment.start)
    ]
    own = _gather(cache, segment, segment.start, total)  # [kv_heads, tokens, 2, head_dim]
    own = own.repeat_interleave(heads // kv_heads, dim=0)[None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(0, 1)[None], own[..., 0, :], own[..., 1, :], 0.0, True, scale=scale
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
    group, outputs = query.shape[1] // cache.kv_heads, []
    for start in range(segment.start, segment.start + segment.tokens, BIASED):
        stop = min(start + BIASED, segment.start + segment.tokens)
        mine = query[start - segment.start : stop - segment.start].transpose(0, 1)[None]
        parts, first, early = [], 0, start
        if window is not None:
            first = early = max(0, start + 1 - window)
        for keys, values in () if window is not None else _key_blocks(cache, segment, start):
            bias = _falling(cache, first, keys.shape[2], stop - 1).view(1, -1, 1, keys.shape[2])
            if group > 1:
                keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
            parts.append(plain_attention(mine, keys, values, bias, scale))
            first += keys.shape[2]
        own = _gather(cache, segment, early, stop).repeat_interleave(group, dim=0)
        position = torch.arange(start, stop, device=query.device)[:, None]
        key = torch.arange(early, stop, device=query.device)
        seen = key <= position  # [tokens, keys]
        if window is not None:
            seen &= position - key < window
        bias = _falling(cache, early, stop - early, stop - 1).view(1, -1, 1, stop - early)
        bias = bias.masked_fill(~seen, -torch.inf)  # [1, heads, tokens, keys]
        parts.append(plain_attention(mine, *_split(own), bias, scale))
        outputs.append(merge(parts)[0][0].transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def _falling(cache: LayerCache, first: int, keys: int, query: int) -> Tensor:
    """What distance from position `query` adds to the scores of `keys` keys from `first` on.

    Returns:
        [1, kv_heads, group, keys].
    """
    position = torch.arange(first, first + keys, device=cache.kv.device)
    return bias_at(cache, position[None, None], position.new_tensor([query]))


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
    scores = _scores(query.to(precise), keys.to(precise), scale)
    return _average(scores if bias is None else scores + bias, values)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores: 0, and -inf where the mask is False."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[batch, kv_heads, queries, keys] (wide); see `plain_attention`."""
    small, left = prescaled(query, scale)
    return (small @ keys.transpose(-1, -2)).to(wide(query.dtype)) * left


def _average(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The values' mean by e ** score, and the scores' log-sum-exp."""
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def _key_blocks(cache: LayerCache, segment: Segment, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values before position `stop`, in pieces [1, kv_heads, keys, head_dim]."""
    kv_heads, head_dim = cache.kv_heads, cache.head_dim
    page = 0  # logical page that the next run begins with
    pending = 0  # logical page from which short runs wait to be gathered together
    for first, pages in segment.runs:
        long = pages >= RUN_PAGES
        if page > pending and (long or page - pending >= GATHER_PAGES):
            yield _split(_gather(cache, segment, pending * PAGE, min(page * PAGE, stop)))
            pending = page
        if page * PAGE >= stop:
            break
        if long:
            run = cache.kv[:, first : first + pages].view(kv_heads, -1, 2, head_dim)
            yield _split(run[:, : stop - page * PAGE])
            pending = page + pages
        page += pages
    if pending * PAGE < min(page * PAGE, stop):
        yield _split(_gather(cache, segment, pending * PAGE, stop))


def _split(keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
    return keys_and_values[None, :, :, 0], keys_and_values[None, :, :, 1]


def _gather(cache: LayerCache, segment: Segment, start: int, stop: int) -> Tensor:
    """A copy of the keys and values at positions `start` to `stop`: [kv_heads, keys, 2, d]."""
    position = torch.arange(start, stop, device=segment.block_table.device)
    slots = segment.block_table[position // PAGE] * PAGE + position % PAGE  # [keys]
    return cache.kv.view(cache.kv_heads, -1, 2, cache.head_dim).index_select(1, slots)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join partial attentions by their log-sum-exps (FlashDecoding's reduction)."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])  # [parts, 1, kv_heads, queries]
    weights = lses.softmax(0)[..., None]  # [parts, 1, kv_heads, queries, 1]
    outputs = torch.stack([output.to(weights.dtype) for output, _ in parts])
    return outputs.mul_(weights).sum(0), lses.logsumexp(0)


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
    copy = _gather(cache, segment, first, segment.start + tokens)
    copy = copy.repeat_interleave(heads // cache.kv_heads, dim=0)[None]
    keys, values = copy[..., 0, :], copy[..., 1, :]  # [1, heads, keys, head_dim]
    mask: Tensor | None
    if window is None:
        # From the start on there is a faster kernel.
        mask = None if segment.start == 0 else causal_lower_right(tokens, keys.shape[2])
    else:
        position = segment.start + torch.arange(tokens, device=query.device)[:, None]
        key = first + torch.arange(keys.shape[2], device=query.device)
        mask = (key <= position) & (position - key < window)  # [tokens, keys]
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
