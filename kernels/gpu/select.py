"""`kernels.dynamic.select` for a piece of the rows, in Triton's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.dynamic import Choice
from kernels.gpu.budget import spend, varies
from kernels.gpu.greatest import take
from kernels.gpu.masses import estimate_masses
from kernels.gpu.shares import rank, totals
from kernels.gpu.spans import NEAR
from kernels.selection import unselected

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.selection import Selection
    from kernels.timing import Phases


def select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Choice:
    """Choose keys; see `kernels.dynamic.select`.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.

    Returns:
        The choice; of its capacity, as much as the budget allows, no row may make full use.
    """
    with phases.time("score", query.device):
        found = estimate_masses(query, cache, rows, scale)
    with phases.time("select", query.device):
        whole = totals(found, policy)
        ranked = rank(found, whole.norm, policy, listed=varies(policy))
        wanted = spend(found, whole, ranked, policy) if varies(policy) else whole.most
        selection, missing = take(found, whole.norm, ranked, wanted, policy)
    return Choice(selection, missing, whole.norm.flatten(1))


def mass_left(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Tensor:
    """Log of the estimated mass that a selection made elsewhere leaves out; float32 [rows, heads].

    From the codes of the keys; the recent window is scored exactly.
    """
    found = estimate_masses(query, cache, rows, scale)
    coded = unselected(selection.indices, found.keys, found.first)[:, :, None]
    recent = unselected(selection.indices, NEAR, found.stops[:, None, None])[:, :, None]
    left = (
        scores.masked_fill_(~free, -torch.inf).logsumexp(-1)  # [rows, kv_heads, group]
        for scores, free in ((found.scores, coded), (found.near, recent))
    )
    return torch.logaddexp(*left).flatten(1)
