"""The budget: how many keys a row reads, between two bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.policy import Dynamic


SAMPLE = 240
"""Fewest keys of a sample: fewer would know too little of those that they stand for."""


def wanted_keys(
    share: Tensor, held: Tensor, always: Tensor, visible: Tensor, policy: Dynamic
) -> Tensor:
    """Top-p between two top-k bounds; `kernels.reference.wanted_keys` is its meaning.

    Args:
        share: [rows, kv_heads, keys], of the row's attention mass; -1 for keys that are always
            read, or not there.
        held: [rows, kv_heads], share of the keys that are always read.
        always: int64 [rows, kv_heads], how many these are.
        visible: int64 [rows], keys each row sees.
        policy: the bounds, below which a sample does not go.

    Returns:
        int64 [rows, kv_heads], how many more are to be read.
    """
    free = (share != -1).sum(-1)
    ranked = share.topk(min(policy.max_keys, share.shape[-1])).values  # a nan is the greatest
    reached = torch.cat((held[..., None], held[..., None] + ranked.clamp_min(0).cumsum(-1)), dim=-1)
    worthy = ranked >= policy.worth / visible[:, None, None]
    needed = torch.minimum((reached < policy.coverage).sum(-1), worthy.sum(-1))
    wanted = needed.clamp_min(policy.min_keys - always).clamp_max(policy.max_keys - always)
    if policy.sampled:
        wanted = wanted.clamp_min(SAMPLE)
    return torch.minimum(wanted, free).clamp_min(0)
