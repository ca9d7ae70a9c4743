"""The mass that a selection made elsewhere leaves out, estimated from the codes of the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.codes import rotation, words
from kernels.cpu.keys import Keys, arrays, numbers, place_of
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.probe import score_kept
from kernels.cpu.scan import level_query, load_query, scan_segment
from kernels.cpu.vectors import log_sum
from kernels.page import PAGE
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


def mass_left(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Tensor:
    """Log of the estimated mass that a selection made elsewhere leaves out; float32 [rows, heads].

    From the codes of the keys; the recent window is scored exactly.
    """
    left = torch.empty(query.shape[:2])
    shared = (
        arrays(cache, rows), numbers(query),
        rotation(cache.head_dim, torch.float32, query.device).numpy(), np.float32(scale),
        words(cache.head_dim), selection.indices.contiguous().numpy(),
        selection.counts.contiguous().numpy(), left.numpy(),
    )  # fmt: skip
    in_threads(_judge_rows, shared, selection.counts.numel())
    return left


def _kernel(version: int) -> Any:
    """The kernel; see `sources` for the version."""

    @entry
    def judge_rows(
        keys: Keys, queries: Any, rotated: Any, scale: Any, words_: int, indices: Any, counts: Any,
        rest: Any, _part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Rows and KV heads `start` to `stop`, head by head."""
        _ = version
        rows, kv_heads = counts.shape
        group = queries.shape[1] // kv_heads
        query = np.empty((group, queries.shape[2]), np.float32)
        planes = np.empty((group, 4, words_ // 2), np.int64)
        level = np.empty((3, group), np.float32)
        size = SEGMENT * PAGE
        scores = np.empty((group, size), np.float32)
        for unit in range(start, stop):
            head, row = unit // rows, unit % rows
            place = place_of(keys, head, row, 0)
            load_query(queries, row, head * group, scale, query)
            level_query(query, rotated, planes, level)
            left = rest[row, head * group : (head + 1) * group]
            left[:] = -np.inf
            taken, number = indices[row, head, : counts[row, head]], 0
            for segment in range((place.coded + size - 1) // size):
                first = (place.first + segment * SEGMENT) * PAGE
                scan_segment(keys, place, segment, query, planes, level, scores)
                while number < taken.shape[0] and taken[number] < first + size:
                    scores[:, taken[number] - first] = -np.inf
                    number += 1
                for reader in range(group):
                    left[reader] = np.logaddexp(left[reader], log_sum(scores[reader]))
            many = score_kept(keys, place, query, scores, 0)
            for key in taken[taken >= place.since]:
                scores[:, key - place.since] = -np.inf
            for reader in range(group):
                left[reader] = np.logaddexp(left[reader], log_sum(scores[reader, :many]))

    return judge_rows


_judge_rows = _kernel(sources())
