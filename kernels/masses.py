"""What the keys' codes say of a row's attention: an estimated mass for every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.codes import estimate
from kernels.page import PAGE
from kernels.scores import recent_positions, scores_at, sees
from kernels.torch_backend import wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


@dataclass(frozen=True, slots=True)
class Masses:
    """Estimated mass of every coded key, those in front of a row's recent window, and its scores.

    The unit of a head is e ** unit, its whole mass by these estimates.
    """

    mass: Tensor  # [rows, kv_heads, group, keys]  in that unit; 0 where not coded
    near: Tensor  # [rows, kv_heads, group, 2 * 64]  likewise, exact, of the recent window
    unit: Tensor  # [rows, kv_heads, group]
    position: Tensor  # int64 [keys]
    coded: Tensor  # bool [rows, keys]
    recent: Tensor  # int64 [rows, 2 * 64]  positions of the recent window
    seen: Tensor  # bool [rows, 2 * 64]  which of them are there


def estimate_masses(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> Masses:
    """Estimate e ** score of every coded key, without bias; arguments as in `dynamic.select`."""
    recent = rows.recent_page
    first = int(rows.starts.min()) // PAGE
    last = max(first, int(recent.max()))
    position = torch.arange(first * PAGE, last * PAGE, device=query.device)
    coded = (position < recent[:, None] * PAGE) & (position >= rows.starts[:, None])
    late = recent_positions(rows, cache.kv_heads)  # [rows, kv_heads, 2 * 64]
    seen = sees(late, rows)
    near = scores_at(query, cache, rows, late, scale).masked_fill_(~seen[:, :, None], -torch.inf)
    scores = estimate(query.to(wide(query.dtype)) * scale, cache, rows, first, last)
    if not bool(coded.all()):
        scores.masked_fill_(~coded[:, None, None], -torch.inf)
    peak = near.amax(-1)
    if last > first:
        peak = torch.maximum(peak, scores.amax(-1))
    mass, near = (part.sub_(peak[..., None]).exp_() for part in (scores, near))
    total = mass.sum(-1) + near.sum(-1)  # [rows, kv_heads, group]
    mass, near = (part.div_(total[..., None]) for part in (mass, near))
    return Masses(mass, near, total.log() + peak, position, coded, late[:, 0], seen[:, 0])
