"""The specification of sparse prompts: which pages a tile reads, and what stands for the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kernels.alibi import page_evenness
from kernels.page import PAGE
from kernels.reference import distance_bias
from kernels.tiles import ALIKE, SAMPLES, TURN

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tiles import TileSelection


def stand_ins(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores of whole pages: the log of the mass that a page's keys carry together, estimated.

    Were a page's scores normal with mean u and variance v, its mass would be 64 e^(u + v / 2), or
    where distance counts (`kernels.alibi`) e^(u + v / 2) times the sum of its keys' e^bias. u is
    the score of the page's mean key. v is taken for |q|^2 times what the keys of a page vary in a
    channel, mean over all pages before the query's, as if they varied alike in all directions.

    Args:
        query: [tokens, heads, head_dim].
        cache: the layer's paged cache, complete pages with their means.
        segment: where the tokens stand and where their keys lie.
        scale: factor on the scores.

    Returns:
        The scores, float64 [tokens, heads, pages] over the segment's pages, of meaning for those
        before a token's own; and v, float64 [tokens, heads].
    """
    group = query.shape[1] // cache.kv_heads
    pages = segment.block_table
    mean = cache.key_mean[:, pages].double().repeat_interleave(group, dim=0)
    spread = cache.spread[:, pages].double().repeat_interleave(group, dim=0)  # [heads, pages]
    before = (segment.start + torch.arange(query.shape[0], device=query.device)) // PAGE
    spread = torch.stack([spread[:, :n].mean(1).nan_to_num(nan=0.0) for n in before.tolist()])
    scaled = query.double() * scale
    centre = torch.einsum("thd,hpd->thp", scaled, mean)
    variance = scaled.square().sum(-1) * spread  # [tokens, heads]
    return centre + variance[..., None] / 2 + _page_mass(query, cache, segment), variance


def _page_mass(query: Tensor, cache: LayerCache, segment: Segment) -> Tensor:
    """Log of the mass of pages whose scores are 0: log 64, or what distance makes of it.

    Returns:
        [tokens, heads, pages].
    """
    tokens, heads, _ = query.shape
    key = torch.arange(len(segment.block_table) * PAGE, device=query.device)
    position = segment.start + torch.arange(tokens, device=query.device)
    bias = distance_bias(cache, key.expand(tokens, heads, -1), position)
    if bias is None:
        bias = torch.zeros(tokens, heads, len(key), dtype=torch.float64, device=query.device)
    return bias.view(tokens, heads, -1, PAGE).logsumexp(-1)


def read_pages(
    query: Tensor, cache: LayerCache, segment: Segment, least: float, scale: float, asked: int
) -> Tensor:
    """The pages that each tile reads; see `kernels.prefill.choose`.

    Of `asked` queries on end the last one is asked; where a tile has none of these, it reads all.

    Returns:
        bool [tiles, kv_heads, pages] over the segment's pages.
    """
    tokens, heads, _ = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    whole, variance = stand_ins(query, cache, segment, scale)  # [tokens, heads, pages]
    first, pages = segment.start // PAGE, whole.shape[2]
    slopes = torch.zeros(heads, device=query.device) if cache.slopes is None else cache.slopes
    even = page_evenness(slopes.double())
    read = torch.zeros(pages - first, kv_heads, pages, dtype=torch.bool, device=query.device)
    for token in range(tokens):
        position = segment.start + token
        tile = position // PAGE
        if (position + 1) % asked:
            continue
        own = cache.kv[:, segment.block_table[tile], : position % PAGE + 1, 0].double()
        own = own.repeat_interleave(group, dim=0)  # [heads, keys, head_dim]
        scores = torch.einsum("hd,hkd->hk", query[token].double() * scale, own)
        if cache.slopes is not None:
            scores += cache.slopes.double()[:, None] * (
                torch.arange(own.shape[1], device=query.device) - position % PAGE
            )
        mass = torch.cat((whole[token, :, :tile], scores), dim=1).softmax(1)[:, :tile]
        error = mass * ((variance[token].exp() / even - 1) / PAGE).sqrt()[:, None]
        read[tile - first, :, :tile] |= error.view(kv_heads, group, tile).amax(1) >= least
    stop = segment.start + tokens
    for row in range(pages - first):
        tile = first + row
        begin, end = max(segment.start, tile * PAGE), min(stop, (tile + 1) * PAGE)
        read[row, :, :tile] |= begin // asked == end // asked
        read[row, :, : min(tile, 1)] = True
        read[row, :, max(0, tile - 1) : tile] = True
    return read


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a segment's tokens over listed pages; see `kernels.prefill.tile_attention`."""
    tokens, heads, _ = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    first, pages = segment.start // PAGE, segment.block_table.shape[0]
    mask = torch.zeros(tokens, kv_heads, pages, PAGE, dtype=torch.bool, device=query.device)
    left = torch.zeros(tokens, kv_heads, pages, dtype=torch.bool, device=query.device)
    for token in range(tokens):
        tile, offset = divmod(segment.start + token, PAGE)
        for head in range(kv_heads):
            start, count, whole = (
                int(part[tile - first, head])
                for part in (selection.starts, selection.counts, selection.whole)
            )
            for number in range(count):
                page = int(selection.pages[start + number])
                row = torch.ones(PAGE, dtype=torch.bool)
                if number >= whole:
                    word = int(selection.bits[selection.masks[start + number], offset])
                    row = torch.tensor([word >> key & 1 for key in range(PAGE)]) == 1
                mask[token, head, page] = row
            if selection.left is not None:
                for page in range(tile):
                    word = int(selection.left[tile - first, head, page // PAGE])
                    left[token, head, page] = word >> page % PAGE & 1 == 1
    flat = cache.kv[:, segment.block_table].double().flatten(1, 2)  # [kv_heads, keys, 2, head_dim]
    flat = flat.repeat_interleave(group, dim=0)  # pages hold anything behind the last key:
    seen = mask.any(0).repeat_interleave(group, dim=0).flatten(1)  # [heads, keys]
    flat = flat.masked_fill(~seen[..., None, None], 0.0)
    mask = mask.flatten(2).repeat_interleave(group, dim=1)  # [tokens, heads, keys]
    scores = torch.einsum("thd,hkd->thk", query.double() * scale, flat[:, :, 0])
    position = segment.start + torch.arange(tokens, device=query.device)
    bias = distance_bias(
        cache, torch.arange(flat.shape[1], device=query.device).expand(scores.shape), position
    )
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    own = scores.logsumexp(-1)
    parts = [(scores, scores, flat[:, :, 1])]
    if selection.left is not None:
        parts += _left(query, cache, segment, left.repeat_interleave(group, dim=1), scale)
    lse = torch.cat([counted for counted, _, _ in parts], dim=-1).logsumexp(-1)
    output = torch.zeros_like(query, dtype=torch.float64)
    for _, weighs, values in parts:
        weights = torch.where(weighs.isneginf(), 0.0, (weighs - lse[..., None]).exp())
        output += torch.einsum("thk,hkd->thd", weights, values)
    return output, lse, own


def _left(
    query: Tensor, cache: LayerCache, segment: Segment, left: Tensor, scale: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What stands for pages: scores by which it counts, by which it weighs, and its values.

    For most queries means do both. For a query whose scores vary little within a page some of its
    keys weigh for all, and count; means then weigh the difference of the mean value and those keys'
    own, which is 0 on average over the keys of a page.
    """
    group, pages = query.shape[1] // cache.kv_heads, segment.block_table
    whole, variance = stand_ins(query, cache, segment, scale)
    alike = (variance < ALIKE)[..., None]  # [tokens, heads, 1]
    number = torch.arange(len(pages), device=query.device)
    mean = cache.value_mean[:, pages].double().repeat_interleave(group, dim=0)
    there = left.any(0)[..., None]  # [heads, pages, 1]
    mean = mean.masked_fill(~there, 0.0)
    plain = whole - variance[..., None] / 2
    nothing = torch.full_like(whole, -torch.inf)
    rough = whole.masked_fill(~left | alike, -torch.inf)
    fine = plain.masked_fill(~(left & alike), -torch.inf)
    parts, own = [(rough, rough, mean)], torch.zeros_like(mean)
    for sample in range(SAMPLES):
        place = (number * TURN + sample * (PAGE // SAMPLES)) % PAGE
        keys, values = cache.kv[:, pages, place].double().unbind(2)  # [kv_heads, pages, head_dim]
        keys = keys.repeat_interleave(group, dim=0).masked_fill(~there, 0.0)
        values = values.repeat_interleave(group, dim=0).masked_fill(~there, 0.0)
        score = torch.einsum("thd,hpd->thp", query.double() * scale, keys)
        score = score + _page_mass(query, cache, segment) - math.log(SAMPLES)
        score = score.masked_fill(~(left & alike), -torch.inf)
        parts.append((score, score, values))
        own += values / SAMPLES
    return [*parts, (nothing, fine, mean - own)]
