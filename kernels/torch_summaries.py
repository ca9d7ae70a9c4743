"""What stands for pages that a prompt's tiles do not read, in torch's operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.alibi import of_groups, page_mass
from kernels.page import PAGE
from kernels.softmax import bias_of, plain_attention, wide
from kernels.tiles import ALIKE, SAMPLES, TURN

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment


def mean_spreads(cache: LayerCache, segment: Segment) -> Tensor:
    """Each tile's mean over the pages before it: float32 [kv_heads, tiles], 0 where none is."""
    # In float64, so that it rounds alike however many pages there are.
    before = F.pad(cache.spread[:, segment.block_table[:-1]].double(), (1, 0)).cumsum(1)
    count = torch.arange(before.shape[1], device=before.device).clamp_min(1)
    return (before / count)[:, segment.start // PAGE :].float()


def attend_means(
    tiled: Tensor, cache: LayerCache, segment: Segment, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over what stands for whole pages; see `kernels.reference_tiles.tile_attention`.

    Args:
        tiled: [kv_heads, tiles, rows, head_dim] queries.
        cache: the layer's paged cache.
        segment: where the tiles stand.
        seen: bool [kv_heads, tiles, pages], of all pages but the last tile's own.
        scale: factor on the scores.
    """
    table, tiles = segment.block_table[:-1], tiled.shape[1]
    if table.shape[0] == 0:
        lse = tiled.new_full(tiled.shape[:-1], -torch.inf, dtype=wide(tiled.dtype))
        return torch.zeros_like(tiled), lse
    tiled = tiled.to(wide(tiled.dtype))  # what is weighed below are differences
    bias = bias_of(seen[:, :, None], tiled.dtype)  # [kv_heads, tiles, 1, pages]
    excess = torch.full_like(cache.spread[:, :1, None], math.log(PAGE))  # [kv_heads, 1, 1]
    if cache.slopes is not None:
        many = tiled.shape[2]
        few = many if many > PAGE else 1  # rows that differ: the heads of a group
        bias = bias + pages_bias(cache, segment, tiles, few, len(table))
        number = torch.arange(many, device=tiled.device) // (many // PAGE)
        excess = excess - (slopes_of_rows(cache, many) * number)[:, None]  # [kv_heads, 1, rows]

    def over(heads: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (
            x[:, None].to(tiled.dtype).expand(-1, tiles, -1, -1) for x in (keys, values)
        )
        added = bias[heads].repeat(1, 1, 1, keys.shape[2] // bias.shape[3])
        output, lse = plain_attention(tiled[heads], keys, values, added, scale)
        return output, lse + excess[heads]

    every = torch.arange(cache.kv_heads, device=tiled.device)
    means = cache.key_mean[:, table], cache.value_mean[:, table]  # [kv_heads, pages, head_dim]
    output, lse = over(every, *means)
    variance = score_variance(tiled, cache, segment, scale)
    alike = variance < ALIKE  # [kv_heads, tiles, rows]
    found = every[alike.flatten(1).any(1)]
    lse = lse + torch.where(alike, 0.0, variance / 2)
    if len(found):
        place = torch.arange(len(table), device=table.device) * TURN
        place = place + torch.arange(SAMPLES, device=table.device)[:, None] * (PAGE // SAMPLES)
        # [heads, SAMPLES, pages, head_dim]
        keys, values = cache.kv[found[:, None, None], table, place % PAGE].unbind(3)
        sampled, sampled_lse = over(found, keys.flatten(1, 2), values.flatten(1, 2))
        sampled_lse -= math.log(SAMPLES)
        # What means weigh but do not count, over what the sampled keys count.
        off = output[found] - over(found, means[0][found], values.to(lse.dtype).mean(1))[0]
        fine = sampled + off * (lse[found] - sampled_lse).exp()[..., None]
        rows = alike[found]
        output[found] = torch.where(rows[..., None], fine, output[found])
        lse[found] = torch.where(rows, sampled_lse, lse[found])
    empty = ~seen.any(-1)[..., None]  # [kv_heads, tiles, 1]
    return output.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)


def score_variance(tiled: Tensor, cache: LayerCache, segment: Segment, scale: float) -> Tensor:
    """Of a query's scores on a page's keys, by estimate: [kv_heads, tiles, rows] (wide).

    See `kernels.reference_tiles.stand_ins`.
    """
    size = tiled.to(wide(tiled.dtype)).square().sum(-1) * (scale * scale)
    return size * mean_spreads(cache, segment)[..., None]


def slopes_of_rows(cache: LayerCache, rows: int) -> Tensor:
    """The slopes of a tile's rows, [kv_heads, rows]."""
    slopes = of_groups(cache)
    return slopes.repeat(1, rows // slopes.shape[1])


def pages_bias(cache: LayerCache, segment: Segment, tiles: int, rows: int, pages: int) -> Tensor:
    """What distance adds to the log of pages' masses, for the first query of each tile.

    Returns:
        [kv_heads, tiles, rows, pages], over what it is where distance does not count.
    """
    slopes = slopes_of_rows(cache, rows)[:, None, :, None]
    tile = segment.start // PAGE + torch.arange(tiles, device=slopes.device)[:, None, None]
    distance = (torch.arange(pages, device=slopes.device) - tile) * PAGE  # [tiles, 1, pages]
    return slopes * distance + (page_mass(slopes) - math.log(PAGE))
