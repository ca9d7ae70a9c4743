"""What the keys' codes say of a row's attention: every key's share of it, about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.alibi import bias_at
from kernels.budget import apart, probed
from kernels.codes import FOURS, estimate
from kernels.page import PAGE
from kernels.sample import SEGMENT
from kernels.scores import scores_at, sees
from kernels.softmax import wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


MOST = 64.0
"""Log of the greatest share: probed keys may miss a peak, and what overflows shows as nan."""


@dataclass(frozen=True, slots=True)
class Masses:
    """Estimated scores of the coded keys, exact ones of the keys that are always read.

    Keys between the sinks and a row's recent window are free: to be read or not.
    """

    scores: Tensor  # [rows, kv_heads, group, keys]  -inf where not free
    held: Tensor  # [rows, kv_heads, group, sinks + 2 * 64]  -inf where there is no key
    norm: Tensor  # [rows, kv_heads, group]  log of the whole mass, as probed keys tell
    first: int  # position of the first of `scores`, the beginning of a segment
    free: Tensor  # bool [rows, keys]
    kept: Tensor  # int64 [rows, sinks + 2 * 64]  positions of the keys that are always read
    seen: Tensor  # bool [rows, sinks + 2 * 64]  which of them are there

    def shares(self) -> Tensor:
        """Shares of the free keys, mean over a group's heads: [rows, kv_heads, keys].

        They sum to about 1 with those that are held. A row whose mass is not finite has none.
        """
        masses = (self.scores - self.norm[..., None]).clamp_max_(MOST).exp_()
        return masses.mean(2).masked_fill_(self.lost()[..., None], 0.0)

    def lost(self) -> Tensor:
        """Where a group's mass is not finite: bool [rows, kv_heads]."""
        return ~self.norm.isfinite().all(-1)

    def held_share(self) -> Tensor:
        """Share of the keys that are always read: [rows, kv_heads]."""
        return (self.held - self.norm[..., None]).exp().sum(-1).mean(-1)


def estimate_masses(
    query: Tensor, cache: LayerCache, rows: Rows, sinks: int, scale: float
) -> Masses:
    """Estimate the score of every free key, so that e ** score is unbiased.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        sinks: keys at the start that are always read, at most 64.
        scale: factor on the scores.
    """
    recent = rows.recent_page
    first = int(rows.starts.min()) // (PAGE * SEGMENT) * SEGMENT
    last = max(first, int(recent.max()))
    position = torch.arange(first * PAGE, last * PAGE, device=query.device)
    stops = recent[:, None] * PAGE
    free = (position < stops) & (position >= rows.starts[:, None]) & (position >= sinks)
    early = torch.arange(sinks, device=query.device).expand(len(recent), -1)
    late = stops + torch.arange(2 * PAGE, device=query.device)
    kept = torch.cat((early, late), dim=-1)
    seen = sees(kept[:, None], rows)[:, 0]
    seen[:, :sinks] &= early < stops  # the recent window has the others
    held = scores_at(query, cache, rows, kept[:, None].expand(-1, cache.kv_heads, -1), scale)
    held.masked_fill_(~seen[:, None, None], -torch.inf)
    scores = estimate(query.to(wide(query.dtype)) * scale, cache, rows, first, last)
    if cache.slopes is not None:
        scores.add_(bias_at(cache, position.expand(1, 1, -1), rows.lengths - 1))
    scores.masked_fill_(~free[:, None, None], -torch.inf)
    position, there = probed(first, last - first, rows.visible)
    some = scores[..., position] + (apart(rows.visible) * FOURS).log()[:, None, None, None]
    some.masked_fill_(~there[:, None, None], -torch.inf)
    norm = torch.cat((held, some), dim=-1).logsumexp(-1)
    return Masses(scores, held, norm, first * PAGE, free, kept, seen)
