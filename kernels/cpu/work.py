"""What the stages of a selection leave for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels.budget import PROBE
from kernels.page import PAGE
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from kernels.cpu.keys import Keys

KEPT = 3 * PAGE
"""Room for the keys that are always read: a page of sinks, and the recent window's two."""


class Work(NamedTuple):
    """Arrays by unit: a row and KV head, the rows of the first KV head in front."""

    planes: Any  # int64 [units, group, 4, words / 2]  see `kernels.cpu.scan.level_query`
    level: Any  # float32 [units, 3, group]  likewise
    centre: Any  # float32 [units, group, pages]  scores of the pages' means
    score: Any  # float32 [units, group, probed and kept keys]
    norm: Any  # float32 [units, group]  log of the whole mass
    marks: Any  # int64 [units]
    named: Any  # int32 [units, keys]  drawn keys, see `kernels.cpu.keys.Place`
    weight: Any  # float32 [units, keys]  log of how many each stands for
    count: Any  # int64 [units, segments]  how many lie behind each other from there on
    always: Any  # int64 [units]  how many keys are always read

    @staticmethod
    def of(keys: Keys, kv_heads: int, group: int) -> Work:
        """Room for every row; what is never touched of it takes no memory."""
        units, words = kv_heads * len(keys.lengths), keys.codes.shape[2] // 2
        segments = -(-keys.lengths // (PAGE * SEGMENT)) - keys.starts // (PAGE * SEGMENT)
        segments = int(segments.max(initial=0))
        pages = segments * SEGMENT
        return Work(
            planes=np.empty((units, group, 4, words), np.int64),
            level=np.empty((units, 3, group), np.float32),
            centre=np.empty((units, group, pages), np.float32),
            score=np.empty((units, group, pages * PROBE + KEPT), np.float32),
            norm=np.empty((units, group), np.float32),
            marks=np.empty(units, np.int64),
            named=np.empty((units, pages * PAGE), np.int32),
            weight=np.empty((units, pages * PAGE), np.float32),
            count=np.empty((units, segments), np.int64),
            always=np.empty(units, np.int64),
        )
