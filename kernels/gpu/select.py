"""`kernels.dynamic.select` for a piece of the rows, in Triton's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.gpu.decode import choose, look_over
from kernels.gpu.layout import CERTAIN, HELD, SLOT_BITS
from kernels.gpu.scan import scan
from kernels.page import PAGE
from kernels.sample import greatest
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.layout import Layout, Scratch
    from kernels.policy import Dynamic
    from kernels.timing import Phases


def select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Selection:
    """Choose keys and lay them out: for audits and tests; `kernels.gpu.decode` reads them as found.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.
    """
    query = query.contiguous()
    if policy.sampled:
        found = choose(query, cache, rows, policy, scale, phases)
        return _selection(rows, policy.sinks, *found)
    return _greatest(query, cache, rows, policy, scale)


def _greatest(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float
) -> Selection:
    """Plain top-k: the kernels tell the shares, torch takes the greatest."""
    layout, scratch = look_over(query, cache, rows, policy, scale)
    share = torch.zeros(layout.lines, layout.pages * PAGE, device=query.device)
    scan(query, cache, rows, policy.sinks, scale, layout, scratch, shares=share)
    share = share.view(len(rows.lengths), layout.kv_heads, -1)
    position = torch.arange(share.shape[-1], device=share.device)
    stop = rows.recent_page[:, None] * PAGE
    free = (position < stop) & (position >= rows.starts[:, None]) & (position >= policy.sinks)
    number = scratch.marks.view(share.shape[:2]).long()
    number = torch.where(number < 0, free.sum(-1)[:, None], number)
    held, seen = _held(rows, policy.sinks)
    chosen = greatest(share, free, number)  # [rows, kv_heads, keys]
    mask = torch.cat((chosen, seen[:, None].expand(-1, layout.kv_heads, -1)), dim=-1)
    position = torch.cat((position.expand(len(held), -1), held), dim=-1)
    return _ascending(mask, position[:, None].expand(mask.shape), None)


def _selection(
    rows: Rows, sinks: int, layout: Layout, scratch: Scratch, positions: Tensor
) -> Selection:
    """The keys always read and those that marks fell on."""
    counts = scratch.counts  # [lines, spans]
    device = counts.device
    number = torch.arange(int(counts.max()) if counts.numel() else 0, device=device)
    there = number < counts[..., None]  # [lines, spans, most]
    position = positions[..., : len(number)].long().flatten(1)  # [lines, places]
    size = (scratch.met[..., : len(number)] >> SLOT_BITS.value).double() / CERTAIN.value
    weight = -size.log().float().flatten(1)
    held, seen = (x.repeat_interleave(layout.kv_heads, dim=0) for x in _held(rows, sinks))
    there = torch.cat((there.flatten(1), seen), dim=-1)
    position = torch.cat((position, held), dim=-1)
    # Where the mass is not finite nothing was drawn, and that shows.
    plain = torch.where(scratch.marks == 0, torch.nan, 0.0)[:, None]
    weight = torch.cat((weight, plain.expand(held.shape)), dim=-1)
    shape = (len(rows.lengths), layout.kv_heads, -1)
    return _ascending(there.view(shape), position.view(shape), weight.view(shape))


def _held(rows: Rows, sinks: int) -> tuple[Tensor, Tensor]:
    """Positions of the keys always read [rows, HELD], and which of them are there."""
    stop = rows.recent_page[:, None] * PAGE  # [rows, 1]
    place = torch.arange(HELD, device=stop.device)
    position = torch.where(place < PAGE, place, stop + place - PAGE)
    end = torch.where(place < PAGE, stop.clamp_max(sinks), rows.lengths[:, None])
    return position, (position >= rows.starts[:, None]) & (position < end)


def _ascending(there: Tensor, position: Tensor, weight: Tensor | None) -> Selection:
    order = torch.where(there, position, 1 << 62).argsort(-1)
    there, position = there.gather(-1, order), position.gather(-1, order)
    return Selection.from_mask(
        there, position, None if weight is None else weight.gather(-1, order)
    )
