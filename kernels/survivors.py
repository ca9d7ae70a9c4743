"""Which pages' codes are read of a row that sees many keys: about half of them.

The codes are most of what a step reads. Of a row that sees `kernels.budget.FAR` keys or more those
of half the pages are enough: of a segment's 16 pages, ordered by how the scores of their means
compare with the mass, the first `SURE`; and of the others, in the same order, one of each `STRATUM`
on end, which stands for them. Its keys are so many times as likely to be drawn, and those that are
stand for so many times as many: sums over the keys read estimate sums over all keys without bias,
whatever the means say. (Two-phase sampling: Neyman 1938, "Contribution to the Theory of Sampling
Human Populations".)

Which one of a stratum it is changes from token to token, so that no page is missed for long, and
the same query reads the same pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import budget
from kernels.sample import SEGMENT, STEP, TURN

if TYPE_CHECKING:
    from torch import Tensor

SURE = 4
"""Pages of a segment that are read for certain."""
STRATUM = 3
"""Pages of which one is read."""
STRATA = (SEGMENT - SURE) // STRATUM
READ = SURE + STRATA
"""Pages of a segment that are read."""
PACE = 0x6A09E667
"""From one token's choice to the next one's: 2 ** 32 times the square root of 2, less 1."""


def share_read(visible: int) -> float:
    """Share of a row's codes that are read, about."""
    return READ / SEGMENT if visible >= budget.FAR else 1.0


def survivors(
    score: Tensor, first: int, lengths: Tensor, visible: Tensor, everything: Tensor
) -> Tensor:
    """For how many pages each page stands.

    Args:
        score: [rows, kv_heads, pages], log of a page's mass about over the whole mass, the greatest
            of a group's heads; -inf where no key is free. What is not a number is the greatest.
        first: the number of the first page, the beginning of a segment.
        lengths: int64 [rows].
        visible: int64 [rows], keys each row sees.
        everything: bool [rows, kv_heads], whether all keys are to be read.

    Returns:
        int64 of the scores' shape: 1, `STRATUM`, or 0 where the codes are not read.
    """
    pages = score.shape[-1]
    segments = -(-pages // SEGMENT)
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    score = F.pad(score, (0, segments * SEGMENT - pages), value=-torch.inf)
    score = score.view(*score.shape[:2], segments, SEGMENT)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(-1)  # [rows, kv_heads, segments, SEGMENT]
    stratum = (rank - SURE).div(STRATUM, rounding_mode="floor")
    drawn = draws(first // SEGMENT, segments, lengths, score.shape[1])
    drawn = F.pad(drawn, (0, 1)).gather(-1, stratum % (STRATA + 1))  # the last is not looked at
    stands = torch.where((rank - SURE) % STRATUM == drawn, STRATUM, 0)
    stands = stands.masked_fill(rank < SURE, 1).flatten(-2)[..., :pages]
    return stands.masked_fill(everything[..., None] | (visible < budget.FAR)[:, None, None], 1)


def draws(first: int, segments: int, lengths: Tensor, kv_heads: int) -> Tensor:
    """Which page of each stratum is read: int64 [rows, kv_heads, segments, STRATA].

    Digits of one number a segment, which are in turn equally often 0 to `STRATUM` - 1.
    """
    segment = torch.arange(first, first + segments, device=lengths.device) * STEP
    head = torch.arange(kv_heads, device=lengths.device)[:, None] * TURN
    power = STRATUM ** torch.arange(STRATA, device=lengths.device)
    part = (segment + head + (lengths * PACE)[:, None, None]) & 0xFFFF_FFFF
    return ((part[..., None] * power & 0xFFFF_FFFF) * STRATUM) >> 32
