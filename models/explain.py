"""What single tokens attended to: the weight of every key in the sum that attention computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.scores import score_every_key, scores_at

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which layers and query heads of a token are to be explained, and by how many keys each."""

    top: int
    layers: frozenset[int] | None = None  # None: all
    heads: tuple[int, ...] | None = None  # None: all

    def takes(self, layer: int) -> bool:
        """Whether a layer is among them."""
        return self.layers is None or layer in self.layers


@dataclass(frozen=True, slots=True)
class Glance:
    """What the wanted heads of one layer attended to for one token."""

    layer: int
    place: int  # of the token in the step
    heads: tuple[int, ...]  # numbers of the query heads
    keys: Tensor  # int64 [heads]  keys that each one's KV head read
    position: Tensor  # int64 [heads, top]  of the keys of the greatest weights
    weight: Tensor  # float32 [heads, top]  these weights, falling
    spread: Tensor  # float32 [length]  weight of every key, mean over the heads


def glance(
    wanted: Wanted,
    layer: int,
    place: int,
    query: Tensor,
    cache: LayerCache,
    row: Rows,
    selection: Selection | None,
    scale: float,
) -> Glance:
    """The weights with which one token's values were summed up; those of a head make 1.

    Where keys were drawn, a key's weight is that of all for which it stands. Dense attention's are
    the softmax over every key. All are computed again from the scores, in float32 at the least.

    Args:
        wanted: which heads, and how many keys of each.
        layer: number of the layer.
        place: of the token in the step.
        query: [1, heads, head_dim].
        cache: the layer's paged cache.
        row: where the token's keys lie.
        selection: the keys that it attended to; None for all.
        scale: factor on the scores.
    """
    if selection is None:
        scored = score_every_key(query, cache, row, scale)
        scores, position = scored.scores, scored.position  # [1, kv_heads, group, n], [1, 1, n]
        keys = row.visible.expand(cache.kv_heads)
    else:
        position, keys = selection.indices, selection.counts[0]  # [1, kv_heads, n], [kv_heads]
        scores = scores_at(query, cache, row, position.clamp_min(0), scale)
        if selection.log_weight is not None:
            scores = scores + selection.log_weight[:, :, None]
        scores = scores.masked_fill(position[:, :, None] < 0, -torch.inf)
    weight = scores[0].softmax(-1).nan_to_num_()  # [kv_heads, group, n]
    group = weight.shape[1]
    place_of = position[0].expand(weight.shape[0], -1).repeat_interleave(group, 0)  # [heads, n]
    heads = tuple(range(query.shape[1])) if wanted.heads is None else wanted.heads
    chosen = torch.tensor(heads, device=query.device)
    each, place_of = weight.flatten(0, 1)[chosen].float(), place_of[chosen]  # [heads, n]
    best = each.topk(min(wanted.top, each.shape[1]), dim=-1)
    spread = each.new_zeros(int(row.lengths[0]) + 1)  # what is none lies behind the last
    there = place_of.where((place_of >= 0) & (place_of < len(spread) - 1), len(spread) - 1)
    spread.index_add_(0, there.flatten(), each.flatten() / len(heads))
    return Glance(
        layer=layer,
        place=place,
        heads=heads,
        keys=keys[chosen // group],
        position=place_of.gather(1, best.indices),
        weight=best.values,
        spread=spread[:-1],
    )
