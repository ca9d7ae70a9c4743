"""The budget: how many marks are put on a row's line (`kernels.sample`), between two bounds.

A few of the keys tell: `PROBE` neighbours in every page, of which each stands for `EACH`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.policy import Dynamic


SAMPLE = 512
"""Fewest marks: a sample of fewer keys would know too little of those that they stand for."""
PROBE = 4
"""Keys of a page that are probed."""
EACH = PAGE // PROBE
"""Keys for which a probed one stands."""


def probed(first: int, pages: int, device: torch.device) -> Tensor:
    """Which keys of pages `first` to `first + pages` are probed: int64 [pages * PROBE].

    Counted from the first page's first key. Those of 16 pages on end are at 16 different places.
    """
    page = torch.arange(first, first + pages, device=device)
    place = (page - first) * PAGE + page * 7 % EACH * PROBE
    return (place[:, None] + torch.arange(PROBE, device=device)).flatten()


def marks(share: Tensor, held: Tensor, always: Tensor, visible: Tensor, policy: Dynamic) -> Tensor:
    """How many marks a row's line gets: doubled from the fewest until `coverage` is reached.

    Or until twice as many would add less than `worth` times the mass for each key that the visible
    keys carry on average; `kernels.reference_sample.marks` is its meaning.

    Args:
        share: [rows, kv_heads, probed], shares of the attention mass; 0 where there is none.
        held: [rows, kv_heads], share of the keys that are always read.
        always: int64 [rows], how many these are.
        visible: int64 [rows], keys each row sees.
        policy: the bounds and targets.

    Returns:
        int64 [rows, kv_heads].
    """
    fewest = SAMPLE if policy.sampled else 0
    most = (policy.max_keys - always).clamp_min(fewest)  # [rows]
    least = torch.minimum((policy.min_keys - always).clamp_min(max(fewest, 1)), most)
    chosen = least[:, None].expand(held.shape)
    ended = torch.zeros_like(held, dtype=torch.bool)
    worth = (policy.worth / visible)[:, None]
    keys, mass = _expected(share, held, chosen)
    while True:
        more = torch.minimum(2 * chosen, most[:, None])
        keys_of_more, mass_of_more = _expected(share, held, more)
        enough = (mass >= policy.coverage) | (more == chosen)
        ended = ended | enough | (mass_of_more - mass < worth * (keys_of_more - keys))
        if bool(ended.all()):
            return chosen
        chosen, keys, mass = (
            torch.where(ended, old, new)
            for old, new in ((chosen, more), (keys, keys_of_more), (mass, mass_of_more))
        )


def _expected(share: Tensor, held: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """How many keys `number` marks meet, and the share of the mass on them and the held keys."""
    met = (share * number[..., None]).clamp_max(1.0)
    return EACH * met.sum(-1), held + EACH * (share * met).sum(-1)
