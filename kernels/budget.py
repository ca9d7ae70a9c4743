"""The budget: how many marks are put on a row's line (`kernels.sample`), between two bounds.

A few of the keys tell, of which each stands for many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.codes import FOURS, by_fours
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.policy import Dynamic


SAMPLE = 512
"""Fewest marks: a sample of fewer keys would know too little of those that they stand for."""
PROBE = 4
"""Keys of a page that are probed."""
APART = 4
"""One page of so many is probed at the least."""
FAR = 32_768
"""Keys of a row from which on one page of two is probed; one of four from twice as many on.

A thousand probed keys tell how much mass there is.
"""


def apart(visible: Tensor) -> Tensor:
    """Of how many pages one is probed in rows that see `visible` keys: int64 1, 2 or `APART`."""
    return 1 + (visible >= FAR).long() + 2 * (visible >= 2 * FAR).long()


def probed(first: int, pages: int, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys of pages `first` to `first + pages` are probed.

    In each page they are one of its fours (`kernels.codes`), in 16 pages on end 16 different ones.
    Where one page of four is probed it is every fourth of 16, of the next 16 those behind them: of
    64 pages on end they are 16 different ones, too. Likewise one page of two.

    Args:
        first: the first page.
        pages: how many.
        visible: int64 [rows], keys each row sees.

    Returns:
        Positions that are probed in some row, counted from the first page's first key: int64
        [pages * PROBE]; and whether they are in each row: bool [rows, pages * PROBE].
    """
    page = torch.arange(first, first + pages, device=visible.device)
    four = by_fours(torch.arange(PAGE, device=visible.device))[page * 7 % FOURS]  # [pages, PROBE]
    position = ((page - first)[:, None] * PAGE + four).flatten()
    each = apart(visible)[:, None]
    there = page % each == page // FOURS % each  # [rows, pages]
    return position, there.repeat_interleave(PROBE, dim=1)


def marks(share: Tensor, held: Tensor, always: Tensor, visible: Tensor, policy: Dynamic) -> Tensor:
    """How many marks a row's line gets: doubled from the fewest until `coverage` is reached.

    Or until twice as many would add less than `worth` times the mass for each key that the visible
    keys carry on average; `kernels.reference_sample.marks` is its meaning.

    Args:
        share: [rows, kv_heads, probed], shares of the attention mass; 0 where none is probed.
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
    each = (apart(visible) * FOURS)[:, None]  # keys for which a probed one stands
    keys, mass = _expected(share, held, chosen, each)
    while True:
        more = torch.minimum(2 * chosen, most[:, None])
        keys_of_more, mass_of_more = _expected(share, held, more, each)
        enough = (mass >= policy.coverage) | (more == chosen)
        ended = ended | enough | (mass_of_more - mass < worth * (keys_of_more - keys))
        if bool(ended.all()):
            return chosen
        chosen, keys, mass = (
            torch.where(ended, old, new)
            for old, new in ((chosen, more), (keys, keys_of_more), (mass, mass_of_more))
        )


def _expected(share: Tensor, held: Tensor, number: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """How many keys `number` marks meet, and the share of the mass on them and the held keys."""
    met = (share * number[..., None]).clamp_max(1.0)
    return each * met.sum(-1), held + each * (share * met).sum(-1)
