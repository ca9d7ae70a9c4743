"""The ops of `kernels.prefill` in torch: tuned for a CPU, correct on any device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.alibi import page_evenness
from kernels.bits import unpacked
from kernels.page import PAGE
from kernels.softmax import bias_of, merge, plain_attention, prescaled, wide
from kernels.tile_calls import calls
from kernels.torch_summaries import attend_means, pages_bias, score_variance, slopes_of_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tile_calls import Reads
    from kernels.tiles import TileSelection

FEW = 4
"""Masks of a list up to which what is made of them is kept for other lists."""


def read_pages(
    query: Tensor, cache: LayerCache, segment: Segment, least: float, scale: float, asked: int
) -> Tensor:
    """The pages that each tile reads: bool [tiles, kv_heads, pages]."""
    tiled, there = _tiled(query, cache.kv_heads, segment)
    kv_heads, tiles, rows, head_dim = tiled.shape
    group, pages, first = rows // PAGE, segment.block_table.shape[0], segment.start // PAGE
    # Of `asked` queries on end the last one.
    tiled = tiled.view(kv_heads, tiles, -1, asked, group, head_dim)[:, :, :, -1].flatten(2, 3)
    there = there.view(tiles, -1, asked, group)[:, :, -1].flatten(1)
    small, left = prescaled(tiled, scale)
    precise = wide(query.dtype)
    keys = cache.kv[:, segment.block_table[first:], :, 0]  # [kv_heads, tiles, 64, head_dim]
    own = (small @ keys.mT).to(precise).mul_(left)  # [kv_heads, tiles, rows, 64]
    place = torch.arange(PAGE, device=query.device)
    number = torch.arange(own.shape[2], device=query.device) // group * asked + asked - 1
    if cache.slopes is not None:
        own.add_(slopes_of_rows(cache, own.shape[2])[:, None, :, None] * (place - number[:, None]))
    own.masked_fill_(place > number[:, None], -torch.inf)
    table = segment.block_table[:-1]
    whole = torch.bmm(small.flatten(1, 2), cache.key_mean[:, table].mT).to(precise).mul_(left)
    whole = whole.view(*own.shape[:3], pages - 1)
    past = _past(segment, tiles, pages - 1)  # [tiles, pages - 1]
    whole.masked_fill_(~past[:, None], -torch.inf)
    even: Tensor | float = 1.0
    if cache.slopes is not None:
        slopes = slopes_of_rows(cache, own.shape[2])
        whole.add_(pages_bias(cache, segment, tiles, own.shape[2], pages - 1))
        whole.sub_((slopes * number)[:, None, :, None])
        even = page_evenness(slopes)[:, None]  # [kv_heads, 1, rows]
    variance = score_variance(tiled, cache, segment, scale)  # [kv_heads, tiles, rows]
    excess = variance / 2 + math.log(PAGE)
    mass = torch.logaddexp(own.logsumexp(-1), whole.logsumexp(-1) + excess)
    # Log of a page's error over its mass.
    error = ((variance.expm1() + (1 - even)) / even).log().sub_(math.log(PAGE)).div_(2)
    enough = mass - excess - error + math.log(least) if least > 0 else mass - torch.inf
    # Of a row that is none a page has little; what is no number is not little.
    enough.masked_fill_(~there, torch.inf)
    read = ~(whole < enough[..., None]).all(2) & past  # [kv_heads, tiles, pages - 1]
    read |= past & ~there.any(1, keepdim=True)
    read[..., :1] |= past[:, :1]
    read |= past & ~_past(segment, tiles, pages - 1, behind=1)  # the page before the tile's
    return F.pad(read, (0, 1)).transpose(0, 1)


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.prefill.tile_attention`."""
    tiled, _ = _tiled(query, cache.kv_heads, segment)
    output, own = _attend_lists(tiled, cache, segment, selection, scale)
    lse = own
    if selection.left is not None:
        seen = unpacked(selection.left)[..., : segment.block_table.shape[0] - 1]
        seen = (seen & _past(segment, *seen.shape[::2])[:, None]).transpose(0, 1)
        output, lse = merge([(output, own), attend_means(tiled, cache, segment, seen, scale)])
    # A softmax over nothing is nan; the op promises 0 and -inf.
    output = output.masked_fill(lse.isneginf()[..., None], 0.0)
    group = tiled.shape[2] // PAGE

    def flat(part: Tensor) -> Tensor:
        """[kv_heads, tiles, 64 * group, ...] to [tokens, heads, ...]."""
        part = part.view(*part.shape[:2], PAGE, group, *part.shape[3:])
        part = part.flatten(1, 2)[:, segment.start % PAGE :]
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


def _attend_lists(
    tiled: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the listed pages, few calls for many lists."""
    kv_heads, tiles, rows, head_dim = tiled.shape
    output = torch.zeros_like(tiled)
    lse = tiled.new_full((kv_heads, tiles, rows), -torch.inf, dtype=wide(tiled.dtype))
    every = cache.kv.flatten(0, 1)  # [kv_heads * pages, 64, 2, head_dim]
    table = segment.block_table.tolist()
    last, used = divmod(segment.start + segment.tokens, PAGE)
    bias = _Bias(tiled, selection)

    def gathered(some: Sequence[tuple[int, Reads]]) -> tuple[Tensor, Tensor]:
        """Keys and values of lists alike in length, [lists, keys, head_dim] each."""
        where = [
            head * cache.kv.shape[1] + table[page] for head, reads in some for page in reads.pages
        ]
        copy = every.index_select(0, torch.tensor(where, device=every.device))
        if used and last < len(table):  # behind the last key anything may lie
            flat = [page == last for _, reads in some for page in reads.pages]
            if any(flat):
                copy[torch.tensor(flat, device=copy.device), used:] = 0
        copy = copy.view(len(some), -1, 2, head_dim)
        if some[0][1].cut:
            copy = copy[:, : used - PAGE]
        keys, values = copy.unbind(2)
        return keys, values

    def falls(lists: Sequence[Sequence[int]], where: tuple[Tensor, Tensor]) -> Tensor:
        """What distance adds (`kernels.alibi`): [tiles, lists, rows, keys]."""
        place = torch.arange(PAGE, device=every.device)
        key = torch.tensor(lists, device=every.device)[..., None] * PAGE + place
        own = (segment.start // PAGE + where[1].T)[..., None] * PAGE  # [tiles, lists, 1]
        own = own + place.repeat_interleave(rows // PAGE)  # [tiles, lists, rows]
        slope = slopes_of_rows(cache, rows)[where[0].T]  # [tiles, lists, rows]
        return slope[..., None] * (key.flatten(1)[None, :, None] - own[..., None])

    def attend(some: Sequence[tuple[int, Reads]], where: tuple[Tensor, Tensor]) -> None:
        """A call: heads and tiles [lists, tiles] of queries, whose lists are `some`."""
        mine = tiled[where]  # [lists, tiles, rows, head_dim]
        reads = some[0][1]
        keys, values = gathered(some)
        added = bias.of(reads.masks, len(reads.pages))
        if cache.slopes is not None:
            fall = falls([reads.pages for _, reads in some], where)[..., : keys.shape[1]]
            added = fall if added is None else added + fall
        if added is None:
            found = plain_attention(mine.flatten(1, 2)[None], keys[None], values[None], None, scale)
        else:
            tall = mine.transpose(0, 1)  # [tiles, lists, rows, head_dim]
            keys, values = (part.expand(len(tall), -1, -1, -1) for part in (keys, values))
            found = plain_attention(tall, keys, values, added, scale)
            found = found[0].transpose(0, 1), found[1].transpose(0, 1)
        output[where], sums = found[0].reshape(mine.shape), found[1].reshape(mine.shape[:-1])
        if added is not None and len(reads.masks) == len(reads.pages):
            # Of a row that sees nothing torch says 0 or nan, by its version.
            sums = sums.masked_fill(added.isneginf().all(-1).transpose(0, 1), -torch.inf)
        lse[where] = sums

    each = PAGE * 2 * head_dim * every.itemsize
    for some, place in calls(selection, last if used else None, used, each):
        attend(some, (place[..., 0].to(tiled.device), place[..., 1].to(tiled.device)))
    empty = lse.isneginf() | lse.isnan()
    return output.masked_fill_(empty[..., None], 0), lse.masked_fill_(empty, -torch.inf)


class _Bias:
    """What is added to the scores of a list: 0, and -inf where a page in part is not seen.

    Lists that end with the same few masks share one, as those of a window's tiles do. Where there
    are many masks lists are seldom alike, and all of them together would take more room than the
    cache does.
    """

    def __init__(self, tiled: Tensor, selection: TileSelection) -> None:
        rows = tiled.shape[2]
        place = torch.arange(PAGE, device=tiled.device)
        seen = (selection.bits[..., None] >> place & 1).bool()  # [masks, 64, 64]
        of_queries = bias_of(seen, tiled.dtype)
        self._masks = of_queries.repeat_interleave(rows // PAGE, dim=1)  # [masks, rows, 64]
        self._most = int(selection.counts.max()) * PAGE
        self._known: dict[tuple[int, ...], Tensor] = {}

    def of(self, masks: tuple[int, ...], pages: int) -> Tensor | None:
        """[1, 1, rows, pages * 64] of a list whose last pages have `masks`."""
        if not masks:
            return None
        if masks in self._known:
            return self._known[masks][None, None, :, self._most - pages * PAGE :]
        kept = len(masks) <= FEW
        whole = self._masks.new_zeros(self._masks.shape[1], self._most if kept else pages * PAGE)
        whole[:, -len(masks) * PAGE :] = torch.cat([self._masks[mask] for mask in masks], 1)
        if kept:
            self._known[masks] = whole
        return whole[None, None, :, -pages * PAGE :]


def _past(segment: Segment, tiles: int, pages: int, behind: int = 0) -> Tensor:
    """Which pages end `behind` pages before a tile begins, or more: bool [tiles, pages]."""
    device = segment.block_table.device
    tile = segment.start // PAGE + torch.arange(tiles, device=device)[:, None]
    return torch.arange(pages, device=device) < tile - behind
