"""Which pages' codes are read (`kernels.survivors`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.launch import jit
from kernels.sample import SEGMENT, STEP, TURN
from kernels.survivors import PACE, STRATUM, SURE

if TYPE_CHECKING:
    from kernels.cpu.keys import Place

_NONE, _MOST = np.float32(-np.inf), np.float32(np.inf)


@jit
def list_survivors(
    place: Place, segment: int, low: int, high: int, centre: Any, norm: Any, everything: bool,
    stands: Any,
) -> None:  # fmt: skip
    """For how many pages each page of a segment stands.

    Args:
        place: the row and KV head.
        segment: which one, as `place` numbers them, like the pages below.
        low: the first page that holds a free key.
        high: behind the last.
        centre: float32 [group, pages], scores of the pages' means.
        norm: float32 [group], log of the whole mass.
        everything: whether all pages are read.
        stands: int64 [SEGMENT], out: 0 where the codes are not read.
    """
    if everything:
        stands[:] = 1
        return
    score = np.full(SEGMENT, _NONE, np.float32)
    for index in range(SEGMENT):
        page = segment * SEGMENT + index
        if low <= page < high:
            for head in range(norm.shape[0]):
                part = centre[head, page] - norm[head]
                part = _MOST if part != part else part
                score[index] = part if part > score[index] else score[index]
    number = (place.first // SEGMENT + segment) * STEP + place.head * TURN + place.length * PACE
    for index in range(SEGMENT):
        rank = 0
        for other in range(SEGMENT):
            rank += score[other] > score[index]
            rank += other < index and score[other] == score[index]
        if rank < SURE:
            stands[index] = 1
            continue
        part = number & 0xFFFFFFFF
        for _ in range((rank - SURE) // STRATUM):
            part = part * STRATUM & 0xFFFFFFFF
        drawn = part * STRATUM >> 32
        stands[index] = STRATUM if (rank - SURE) % STRATUM == drawn else 0
