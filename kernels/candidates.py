"""Which keys of a long context are worth an exact score, and the mass of those that are not.

Every key's score is estimated from its code (`kernels.codes`), and those with the largest estimated
share of the attention mass are the candidates. The mass of the others is estimated too. To sum
their estimates would say too little: a key missed being a candidate because its error was negative
more often than not. So the sum is over what *would* not be a candidate after the error's tilt.
For a normal error e of variance v,

    E[exp(s + e - v / 2) f(s + e - v)] = exp(s) E[f(s + e)]

for any f; with f = "is no candidate" the right side is the mass of the others, on average, and the
left side is known: sum exp(estimate - v / 2) over the keys that would be no candidates if their
estimates were lower by v (for the other heads of the group: by the covariance of their errors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.budget import best
from kernels.codes import NOISE, estimate
from kernels.page import PAGE
from kernels.torch_backend import head_offsets, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic


@dataclass(frozen=True, slots=True)
class Masses:
    """Estimated mass of every coded key: those in front of a row's recent window."""

    query: Tensor  # [rows, kv_heads, group, head_dim]  wide, scaled
    mass: Tensor  # [rows, kv_heads, group, keys]  e ** (score - peak); 0 where not coded
    page_mass: Tensor  # [rows, kv_heads, group, pages]  its sums
    peak: Tensor  # [rows, kv_heads, group]
    coded: Tensor  # bool [rows, 1, keys]
    first: int  # page that they begin with


def estimate_masses(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> Masses:
    """Estimate e ** score of every coded key, without bias; arguments as in `select`."""
    recent = rows.recent_page
    first = int(rows.starts.min()) // PAGE
    last = max(first, int(recent.max()))
    position = torch.arange(first * PAGE, last * PAGE, device=query.device)
    coded = (position < recent[:, None] * PAGE) & (position >= rows.starts[:, None])
    coded = coded[:, None]  # [rows, 1, keys]
    query = query.to(wide(query.dtype)) * scale
    scores = estimate(query, cache, rows, first, last)
    query = query.view(*scores.shape[:3], -1)
    if not bool(coded.all()):
        scores.masked_fill_(~coded[:, :, None], -torch.inf)
    peak = scores.amax(-1) if last > first else scores.new_zeros(scores.shape[:3])
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # of a row without coded keys
    mass = scores.sub_(peak[..., None]).exp_()  # in place: fresh memory costs more than the work
    page_mass = mass.view(*mass.shape[:3], -1, PAGE).sum(-1)
    return Masses(query, mass, page_mass, peak, coded, first)


def name_candidates(
    found: Masses, cache: LayerCache, rows: Rows, recent: Tensor, policy: Dynamic
) -> tuple[Tensor, Tensor]:
    """The keys to score exactly.

    Args:
        found: estimates for some rows.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        recent: [rows, kv_heads, group], log of the exact mass of the recent window.
        policy: names how many.

    Returns:
        int64 [rows, kv_heads, candidates], ascending positions, -1 behind the last, the sinks among
        them; and [rows, kv_heads, group], the log of the estimated mass of the other coded keys.
    """
    mass, group, first = found.mass, found.mass.shape[2], found.first * PAGE
    sums = found.page_mass.sum(-1)  # [rows, kv_heads, group]
    weight = 1 / (sums + (recent - found.peak).exp()) / group
    # The mean over the group of each head's share, as one product.
    rank = (weight[:, :, None] @ mass).squeeze(2)  # [rows, kv_heads, keys]
    rank.masked_fill_(~found.coded, -1.0)
    sinks = max(0, policy.sinks - first)
    rank[..., :sinks].masked_fill_(found.coded[..., :sinks], torch.inf)
    near = best(rank, min(policy.candidates, rank.shape[-1]))  # [rows, kv_heads, candidates]
    there, place = near >= 0, near.clamp_min(0)
    own = mass.gather(-1, place[:, :, None].expand(-1, -1, group, -1)) * there[:, :, None]
    named = torch.where(there, near + first, -1)
    slots = rows.slots(named.clamp_min(0)) + head_offsets(cache, named.device)
    noise = cache.scale.view(-1)[slots].square()[:, :, None] * NOISE  # [.., 1, candidates]
    overlap = found.query @ found.query.mT  # [rows, kv_heads, group, group]
    least = rank.gather(-1, place).masked_fill_(~there, torch.inf).amin(-1, keepdim=True)
    rest = (sums - own.sum(-1)).clamp_min(0)  # [rows, kv_heads, group]
    shares = own * weight[..., None]
    for head in range(group):
        tilt = (overlap[:, :, head, :, None] * -noise).exp_()  # [rows, kv_heads, group, candidates]
        back = (shares * tilt).sum(2) < least  # [rows, kv_heads, candidates]
        rest[:, :, head] += (own[:, :, head] * back).sum(-1)
    return named, rest.log() + found.peak
