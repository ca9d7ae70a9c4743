"""Where a prompt's tokens look: pages of queries over pages of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.bits import ones, unpacked
from kernels.errors import KernelError
from kernels.page import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


ALIKE = 0.5
"""Variance of a query's scores within a page under which some of its keys stand for it, too."""
SAMPLES = 2
"""How many: a power of two."""
TURN = 37
"""The first one's place in page p is 37 p % 64: of 64 pages on end all differ."""


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
    # int64 [tiles, kv_heads, words]  pages for which their means stand, packed; None: none
    left: Tensor | None = None
    order: Tensor | None = None  # int32 [tiles]  which tile begins first; None: the last one

    @staticmethod
    def of_heads(parts: Sequence[TileSelection], order: Sequence[int]) -> TileSelection:
        """Lists of KV heads that do not share them.

        Args:
            parts: of one KV head each, of the same tiles; no means stand for pages.
            order: of each KV head, the part that is its own.
        """
        places = list(accumulate((len(part.pages) for part in parts), initial=0))
        rows = list(accumulate((len(part.bits) for part in parts), initial=0))

        def by_head(columns: list[Tensor]) -> Tensor:
            return torch.cat(columns, dim=1)[:, list(order)]

        return TileSelection(
            starts=by_head([part.starts + n for part, n in zip(parts, places, strict=False)]),
            counts=by_head([part.counts for part in parts]),
            whole=by_head([part.whole for part in parts]),
            pages=torch.cat([part.pages for part in parts]),
            masks=torch.cat([part.masks + n for part, n in zip(parts, rows, strict=False)]),
            bits=torch.cat([part.bits for part in parts]),
        )

    def attended_by_query(self, first: int, queries: int) -> Tensor:
        """How many keys each query's lists hold; what stands for unread pages is not counted.

        Args:
            first: position of the first query, in the first tile.
            queries: how many there are.

        Returns:
            int64 [queries, kv_heads].
        """
        seen = unpacked(self.bits).view(-1, PAGE, PAGE).sum(-1)  # int64 [masks, 64]
        listed = seen[self.masks.long().clamp(0, len(seen) - 1)]  # [places, 64]
        before = F.pad(listed.cumsum(0), (0, 0, 1, 0))  # int64 [places + 1, 64]
        partial = before[self.starts + self.counts] - before[self.starts + self.whole]
        total = partial + self.whole[..., None] * PAGE  # [tiles, kv_heads, 64]
        return total.transpose(1, 2).flatten(0, 1)[first % PAGE :][:queries]

    def to(self, device: torch.device | str) -> TileSelection:
        """The same lists on a device."""
        left, order = self.left, self.order
        return TileSelection(
            starts=self.starts.to(device),
            counts=self.counts.to(device),
            whole=self.whole.to(device),
            pages=self.pages.to(device),
            masks=self.masks.to(device),
            bits=self.bits.to(device),
            left=None if left is None else left.to(device),
            order=None if order is None else order.to(device),
        )

    def longest_first(self) -> TileSelection:
        """The same lists, in an order by which no long one is left for the end."""
        order = self.counts.sum(1).argsort(descending=True, stable=True)
        return replace(self, order=order.to(torch.int32))

    def attended(self, first: int, queries: int) -> Tensor:
        """How many (query, key) pairs the lists hold; what stands for unread pages is not counted.

        Args:
            first: position of the first query, in the first tile.
            queries: how many there are; the last tile's others do not count.

        Returns:
            int64 [tiles, kv_heads].
        """
        total = self._pairs(0, PAGE)
        last = (first + queries - 1) // PAGE - first // PAGE
        total[:1] -= self._pairs(0, first % PAGE)[:1]
        total[last : last + 1] -= self._pairs((first + queries - 1) % PAGE + 1, PAGE)[last:][:1]
        total[last + 1 :] = 0
        return total

    def _pairs(self, begin: int, end: int) -> Tensor:
        """How many pairs the lists hold of the queries from `begin` to `end` of each tile."""
        seen = ones(self.bits[:, begin:end])  # int64 [masks]
        listed = seen[self.masks.long().clamp(0, len(seen) - 1)]
        before = F.pad(listed.cumsum(0), (1, 0))  # int64 [places + 1]
        partial = before[self.starts + self.counts] - before[self.starts + self.whole]
        return self.whole.long() * ((end - begin) * PAGE) + partial

    def validate(self, first: int, queries: int, keys: int, *, causal: bool = True) -> None:
        """Check every promise of this class; it waits for the device, so it is for tests.

        Args:
            first: position of the first query.
            queries: how many there are.
            keys: how many keys there are; none behind them may be seen.
            causal: whether a query sees only keys up to itself.

        Raises:
            KernelError: naming the first promise that does not hold.
        """
        if self.counts.shape[0] != -(-(first + queries) // PAGE) - first // PAGE:
            raise KernelError("the lists' tiles are not those of the queries")
        shapes = {part.shape for part in (self.starts, self.counts, self.whole)}
        if (
            len(shapes) > 1
            or self.pages.shape != self.masks.shape
            or self.bits.shape[1:] != (PAGE,)
        ):
            raise KernelError("the lists' shapes do not fit together")
        wide, narrow = (self.starts, self.bits), (self.counts, self.whole, self.pages, self.masks)
        if any(x.dtype != torch.int64 for x in wide) or any(x.dtype != torch.int32 for x in narrow):
            raise KernelError("the lists have a dtype that is not theirs")
        if bool(((self.whole < 0) | (self.whole > self.counts)).any()):
            raise KernelError("a list has more pages that are seen whole than pages")
        if bool(((self.starts < 0) | (self.starts + self.counts > len(self.pages))).any()):
            raise KernelError("a list lies outside the places")
        counts = self.counts.flatten().long()
        number = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        place = torch.arange(len(number), device=counts.device)
        place = place - (counts.cumsum(0) - counts)[number]  # in its list
        where = self.starts.flatten()[number] + place
        page, partial = self.pages[where].long(), place >= self.whole.flatten()[number]
        if bool(((page < 0) | (page * PAGE >= keys)).any()):
            raise KernelError("a list holds a page that does not exist")
        same = (number[1:] == number[:-1]) & (partial[1:] == partial[:-1])
        if bool((same & (page[1:] <= page[:-1])).any()):
            raise KernelError("a list's pages do not ascend")
        entry = number * -(-keys // PAGE) + page
        if len(torch.unique(entry)) != len(entry):
            raise KernelError("a list holds a page twice")
        row = self.masks[where][partial].long()
        if bool(((row < 0) | (row >= len(self.bits))).any()):
            raise KernelError("a page that is seen in part has no mask")
        tile = first // PAGE + number // self.counts.shape[1]
        over = ((page + 1) * PAGE > keys) | ((page >= tile) if causal else (page < 0))
        if bool((over & ~partial).any()):
            raise KernelError("a page is seen whole that holds a key which may not be seen")
        key = torch.arange(PAGE, device=page.device)
        bits = unpacked(self.bits[row]).view(-1, PAGE, PAGE)  # [partial places, 64, 64]
        at = page[partial, None, None] * PAGE + key
        hidden = at >= keys
        if causal:
            hidden = hidden | (at > tile[partial, None, None] * PAGE + key[:, None])
        if bool((bits & hidden).any()):
            raise KernelError("a mask shows a key which may not be seen")
        if self.left is not None and bool(unpacked(self.left).flatten(0, 1)[number, page].any()):
            raise KernelError("a page is read, and its mean stands for it, too")
        if self.order is not None and sorted(self.order.tolist()) != list(range(len(self.counts))):
            raise KernelError("the order is not one of the tiles")
