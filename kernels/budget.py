"""The budget: the fewest keys whose estimated mass reaches the target, between two bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.policy import Dynamic


def cut_by_mass(
    importance: Tensor, kept: Tensor, eligible: Tensor, visible: Tensor, policy: Dynamic
) -> Tensor:
    """Top-p between two top-k bounds; `kernels.reference.cut_by_mass` is its meaning.

    Args:
        importance: [rows, kv_heads, candidates], share of the row's attention mass.
        kept: bool, same shape: always chosen.
        eligible: bool, same shape: may be chosen.
        visible: int64 [rows], keys each row sees, candidates or not.
        policy: the bounds.

    Returns:
        bool [rows, kv_heads, candidates].
    """
    always = kept.sum(-1)  # [rows, kv_heads]
    free = eligible & ~kept
    scores = importance.masked_fill(~free, -1.0)
    most = min(policy.max_keys, scores.shape[-1])
    ranked = scores.topk(most, dim=-1).values  # a nan counts as the greatest
    mass = importance.masked_fill(~kept, 0.0).sum(-1, keepdim=True)
    reached = torch.cat(
        (mass, mass + ranked.clamp_min(0).cumsum(-1)), dim=-1
    )  # [rows, kv_heads, most + 1]
    worthy = ranked >= policy.worth / visible[:, None, None]
    needed = torch.minimum((reached < policy.coverage).sum(-1), worthy.sum(-1))
    wanted = needed.clamp_min(policy.min_keys - always).clamp_max(policy.max_keys - always)
    wanted = torch.minimum(wanted, free.sum(-1)).clamp_min(0)
    if most == 0:
        return kept
    return kept | top(scores, wanted, ranked.gather(-1, (wanted - 1).clamp_min(0)[..., None]))


def best(scores: Tensor, count: int) -> Tensor:
    """Where the `count` greatest stand; ties go to the lowest index, negative ones are left out.

    Args:
        scores: [..., n], of which a nan may count as any.
        count: 0 to n.

    Returns:
        int64 [..., count], ascending, -1 behind the last.
    """
    if count == 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    scores = scores.float()
    wanted = torch.full(scores.shape[:-1], count, device=scores.device)
    mask = top(scores, wanted, bisect_greatest(scores, count)) & (scores >= 0)
    # Each goes to the place that as many stand in front of; those not chosen, behind them all.
    place = torch.where(mask, mask.cumsum(-1) - 1, count)
    index = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    out = torch.full((*scores.shape[:-1], count + 1), -1, device=scores.device)
    return out.scatter_(-1, place, index)[..., :count]


def bisect_greatest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th greatest of the last axis, [..., 1], found by counting what is greater.

    A GPU sorts long rows far more slowly. The bits of numbers that are not negative order as the
    numbers do.

    Args:
        scores: float32 [..., n]. Where fewer than `count` are not negative, zero is given.
        count: 1 to n.
    """
    bits = scores.view(torch.int32)
    low = torch.full_like(bits[..., :1], -1)  # at least `count` are greater, of those above -1
    high = torch.full_like(low, 0x7FFF_FFFF)  # fewer are
    for _ in range(31):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the difference may not fit
        enough = (bits > middle).sum(-1, keepdim=True) >= count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return high.view(torch.float32)


def top(scores: Tensor, wanted: Tensor, least: Tensor) -> Tensor:
    """The greatest scores; ties go to the lowest index.

    Args:
        scores: [..., n].
        wanted: int64 [...], how many.
        least: [..., 1], the `wanted`-th greatest score; any where none is wanted.

    Returns:
        bool [..., n].
    """
    above = scores > least
    level = scores == least
    room = wanted[..., None] - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
