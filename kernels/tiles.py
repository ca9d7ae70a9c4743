"""Where a prompt's tokens look: pages of queries over pages of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileSelection:
    """Prefill: the pages of keys that each page of queries attends to, in ragged lists.

    A tile is 64 queries at positions that are a multiple of 64 and on, for one KV head's group.
    The pages of a list that are seen whole come first, those seen in part behind them.
    """

    starts: Tensor  # int64 [tiles, kv_heads]  where each list begins in `pages`
    counts: Tensor  # int32 [tiles, kv_heads]  pages in it
    whole: Tensor  # int32 [tiles, kv_heads]  how many of them, the first ones, are seen whole
    pages: Tensor  # int32 [places]  logical pages, ascending among the whole and among the others
    masks: Tensor  # int32 [places]  row of `bits` for a page seen in part; of no meaning else
    bits: Tensor  # int64 [masks, 64]  bit k of word q: whether the tile's query q sees page's key k
    # int64 [tiles, kv_heads, words]  pages for which their means stand: bit p % 64 of word p // 64;
    # None for none
    left: Tensor | None = None


def packed(flags: Tensor) -> Tensor:
    """bool [..., n] as the bits of int64 [..., ceil(n / 64)]."""
    room = -(-flags.shape[-1] // PAGE) * PAGE
    padded = torch.nn.functional.pad(flags, (0, room - flags.shape[-1])).unflatten(-1, (-1, PAGE))
    return (padded.long() << torch.arange(PAGE, device=flags.device)).sum(-1)


def unpacked(words: Tensor) -> Tensor:
    """The bits of int64 [..., words]: bool [..., words * 64]."""
    place = torch.arange(PAGE, device=words.device)
    return (words[..., None] >> place & 1).bool().flatten(-2)
