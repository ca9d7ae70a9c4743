"""The ops of `kernels.prefill` in torch: tuned for a CPU, correct on any device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.page import PAGE
from kernels.torch_backend import merge, plain_attention, prescaled, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tiles import TileSelection


def stand_ins(tiled: Tensor, cache: LayerCache, table: Tensor, scale: float) -> Tensor:
    """Scores of whole pages; see `kernels.reference.stand_ins`.

    Args:
        tiled: [kv_heads, ..., head_dim] queries.
        cache: the layer's paged cache.
        table: int64 [pages], complete physical pages.
        scale: factor on the scores.

    Returns:
        [kv_heads, ..., pages] (wide).
    """
    mean, spread = cache.key_mean[:, table], cache.spread[:, table]
    rows, left = prescaled(tiled.flatten(1, -2), scale)  # [kv_heads, rows, head_dim]
    scores = torch.bmm(rows, mean.mT).to(wide(tiled.dtype)) * left
    size = rows.to(scores.dtype).square().sum(-1, keepdim=True) * (left * left / 2)
    scores += size * spread[:, None].to(scores.dtype) + math.log(PAGE)
    return scores.view(*tiled.shape[:-1], -1)


def read_pages(
    query: Tensor, cache: LayerCache, segment: Segment, least: float, scale: float
) -> Tensor:
    """The pages that each tile reads of itself: bool [tiles, kv_heads, pages]."""
    tiled, there = _tiled(query, cache.kv_heads, segment)
    tiles, pages = tiled.shape[1], segment.block_table.shape[0]
    first = segment.start // PAGE
    own = cache.kv[:, segment.block_table[first:], :, 0]  # [kv_heads, tiles, 64, head_dim]
    small, rest = prescaled(tiled, scale)
    scores = (small @ own.mT).to(wide(query.dtype)) * rest  # [kv_heads, tiles, rows, 64]
    place = torch.arange(PAGE, device=query.device)
    row = torch.arange(tiled.shape[2], device=query.device) // (tiled.shape[2] // PAGE)
    scores.masked_fill_(place > row[:, None], -torch.inf)
    page, tile = torch.arange(pages, device=query.device), first + place.new_tensor(range(tiles))
    past = page < tile[:, None]  # [tiles, pages]
    whole = stand_ins(tiled, cache, segment.block_table[: pages - 1], scale)
    whole = F.pad(whole, (0, 1)).masked_fill_(~past[:, None], -torch.inf)
    mass = torch.logaddexp(whole.logsumexp(-1), scores.logsumexp(-1))
    # Put so that what is not a number is read.
    share = (whole - mass[..., None]) < (math.log(least) if least > 0 else -torch.inf)
    share = ~share & there[:, :, None]
    read = share.any(2) & past  # [kv_heads, tiles, pages]
    read |= past & ((page == 0) | (page == tile[:, None] - 1))
    return read.transpose(0, 1)


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.prefill.tile_attention`."""
    tiled, there = _tiled(query, cache.kv_heads, segment)
    kv_heads, tiles, rows, head_dim = tiled.shape
    parts = _whole_pages(tiled, cache, segment, selection, scale)
    parts += _parts_of_pages(tiled, cache, segment, selection, scale)
    output, own = merge(parts)
    lse = own
    if selection.left is not None:
        output, lse = merge([(output, own), _means(tiled, cache, segment, selection.left, scale)])
    # A softmax over nothing is nan; the op promises 0 and -inf.
    output = output.masked_fill(lse.isneginf()[..., None], 0.0)
    group = rows // PAGE

    def flat(part: Tensor) -> Tensor:
        """[kv_heads, tiles, 64 * group, ...] to [tokens, heads, ...]."""
        part = part.unflatten(2, (PAGE, group)).flatten(1, 2)[:, segment.start % PAGE :]
        return part[:, : segment.tokens].transpose(0, 1).flatten(1, 2)

    return flat(output).to(query.dtype), flat(lse), flat(own)


def _tiled(query: Tensor, kv_heads: int, segment: Segment) -> tuple[Tensor, Tensor]:
    """Queries by tile, [kv_heads, tiles, 64 * group, head_dim], and which are there."""
    tokens, heads, head_dim = query.shape
    before = segment.start % PAGE
    behind = -(before + tokens) % PAGE
    whole = F.pad(query, (0, 0, 0, 0, before, behind))
    whole = whole.view(-1, PAGE, kv_heads, heads // kv_heads, head_dim)
    place = torch.arange(whole.shape[0] * PAGE, device=query.device)
    there = (place >= before) & (place < before + tokens)
    there = there.view(-1, PAGE).repeat_interleave(heads // kv_heads, dim=1)
    return whole.permute(2, 0, 1, 3, 4).flatten(2, 3), there


def _whole_pages(
    tiled: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Attention over the pages that are seen whole, list by list."""
    kv_heads, tiles, rows, head_dim = tiled.shape
    output = torch.zeros_like(tiled)
    lse = tiled.new_full((kv_heads, tiles, rows), -torch.inf, dtype=wide(tiled.dtype))
    physical = segment.block_table[selection.pages.long()]
    starts, whole = selection.starts.tolist(), selection.whole.tolist()
    for tile in range(tiles):
        for head in range(kv_heads):
            start, count = starts[tile][head], whole[tile][head]
            if count == 0:
                continue
            pages = cache.kv[head].index_select(0, physical[start : start + count])
            keys, values = pages.view(1, 1, -1, 2, head_dim).unbind(3)
            some = tiled[head, tile][None, None]
            found = plain_attention(some, keys, values, None, scale)
            output[head, tile], lse[head, tile] = found[0][0, 0], found[1][0, 0]
    return [(output, lse)]


def _parts_of_pages(
    tiled: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Attention over the pages that are seen in part: every list's first of them, and so on."""
    group = tiled.shape[2] // PAGE
    starts, whole = selection.starts.T, selection.whole.T.long()  # [kv_heads, tiles]
    amount = selection.counts.T - whole
    place = torch.arange(PAGE, device=tiled.device)
    head = torch.arange(cache.kv_heads, device=tiled.device)[:, None]
    parts = []
    for number in range(int(amount.max()) if amount.numel() else 0):
        slot = (starts + whole + number).clamp_max(selection.pages.shape[0] - 1)
        number_of = selection.pages[slot].long()  # [kv_heads, tiles]
        page = segment.block_table[number_of]
        words = selection.bits[selection.masks[slot].long()]  # [kv_heads, tiles, 64]
        seen = (words[..., None] >> place & 1).bool() & (number < amount)[..., None, None]
        keys, values = cache.kv[head, page].unbind(3)  # [kv_heads, tiles, 64, head_dim]
        # Pages hold anything behind the last key.
        there = (number_of[..., None] * PAGE + place < segment.start + segment.tokens)[..., None]
        keys, values = keys.masked_fill(~there, 0), values.masked_fill(~there, 0)
        mask = (seen & there.mT).repeat_interleave(group, dim=2)
        output, lse = plain_attention(tiled, keys, values, mask, scale)
        empty = ~mask.any(-1)
        output, lse = output.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
        parts.append((output, lse))
    return parts


def _means(
    tiled: Tensor, cache: LayerCache, segment: Segment, left: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over what stands for the unread pages."""
    first = segment.start // PAGE
    most = min(left.shape[2], first + tiled.shape[1] - 1)
    table = segment.block_table[:most]
    past = torch.arange(most, device=left.device) < torch.arange(
        first, first + tiled.shape[1], device=left.device
    ).unsqueeze(1)
    seen = (left[..., :most] & past[:, None]).transpose(0, 1)[:, :, None]
    scores = stand_ins(tiled, cache, table, scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    values = cache.value_mean[:, table][:, None]  # [kv_heads, 1, pages, head_dim]
    return weights.to(values.dtype) @ values, lse
