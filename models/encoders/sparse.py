"""Attention of one text's tokens over the pages that its plan lists, through the paged cache.

A selection holds no key twice, but a model may count one several times: BigBird does where what it
draws at random is among what it sees anyway. A softmax over a multiset of keys is the merge of
softmaxes over sets: attention over the keys as a set, and over those that count m times more, whose
log-sum-exp is raised by log m. So a plan has a part for the set and one for every m, and their
outputs are joined by their log-sum-exps, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.cache import LayerCache, Segment
from kernels.page import PAGE
from kernels.prefill import tile_attention

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.attention import Impl
    from kernels.tiles import TileSelection


@dataclass(frozen=True, slots=True)
class Part:
    """Lists of pages, and how many times each of their keys counts."""

    selection: TileSelection
    times: int = 1


Plan = tuple[Part, ...]
"""Where the tokens of a text look in one layer: each key at least once, in the first part."""


@dataclass(frozen=True, slots=True)
class Place:
    """A text's part of the cache that all layers fill in turn."""

    cache: LayerCache
    segment: Segment

    @staticmethod
    def of(cache: LayerCache, page: int, tokens: int, device: torch.device) -> Place:
        """The pages from `page` on, for so many tokens."""
        pages = -(-tokens // PAGE)
        return Place(cache, Segment.of(list(range(page, page + pages)), 0, tokens, device))

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store a layer's keys and values: [tokens, heads, head_dim] each."""
        self.cache.write_run(self.segment.run[0], keys, values)


def attend(query: Tensor, place: Place, plan: Plan, scale: float, impl: Impl) -> Tensor:
    """Attention over what is written at a place.

    Args:
        query: [tokens, heads, head_dim].
        place: where the text's keys and values lie.
        plan: where its tokens look.
        scale: factor on the scores.
        impl: backend.

    Returns:
        [tokens, heads, head_dim], 0 for a token that sees nothing.
    """
    found = [
        tile_attention(query, place.cache, place.segment, part.selection, scale, impl)[:2]
        for part in plan
    ]
    joined, lse = found[0]
    if len(found) == 1:
        return joined
    joined = joined.to(lse.dtype)
    for part, (output, own) in zip(plan[1:], found[1:], strict=True):
        more = own + math.log(part.times)
        joined.lerp_(output.to(lse.dtype), torch.sigmoid(more - lse)[..., None])
        lse = torch.logaddexp(lse, more)
    # What sees nothing has become no number.
    return joined.masked_fill_(lse.isneginf()[..., None], 0).to(query.dtype)
