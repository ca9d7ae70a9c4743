"""The mass that a selection made elsewhere leaves out, estimated from the codes of the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.codes import rotation, words
from kernels.cpu.choose import score_near, share_left, total_of, unite
from kernels.cpu.keys import Keys, arrays, numbers, place_of
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.scan import BLOCK, level_query, load_query, scan_codes
from kernels.page import PAGE

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
    count, heads, head_dim = query.shape
    left = torch.empty(count, heads)
    pages = int((rows.recent_page - rows.starts // PAGE).max().clamp_min(0))
    shared = (
        arrays(cache, rows), numbers(query),
        rotation(head_dim, torch.float32, query.device).numpy(), np.float32(scale),
        words(head_dim), pages, selection.indices.contiguous().numpy(),
        selection.counts.contiguous().numpy(), left.numpy(),
    )  # fmt: skip
    in_threads(_judge_rows, shared, count * cache.kv_heads)
    return left


def _kernel(version: int) -> Any:
    """The kernel; see `sources` for the version."""

    @entry
    def judge_rows(
        keys: Keys, queries: Any, rotated: Any, scale: Any, words_: int, most: int, indices: Any,
        counts: Any, rest: Any, _part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Rows and KV heads `start` to `stop`, head by head."""
        _ = version
        rows, kv_heads = counts.shape
        group = queries.shape[1] // kv_heads
        query = np.empty((group, queries.shape[2]), np.float32)
        planes = np.empty((group, 4, words_), np.int64)
        level = np.empty((3, group), np.float32)
        whole = np.empty(group, np.float32)
        mass = np.empty((group, most * PAGE), np.float32)
        for unit in range(start, stop):
            head, row = unit // rows, unit % rows
            place = place_of(keys, head, row)
            blocks = (place.coded // PAGE + BLOCK - 1) // BLOCK
            load_query(queries, row, head * group, scale, query)
            level_query(query, rotated, planes, level)
            peak = np.empty((2, group, blocks), np.float32)
            factor = np.empty((group, blocks), np.float32)
            scan_codes(keys, place, (0, blocks), query, planes, level, mass, peak)
            near = score_near(keys, place, query)
            unite(near, peak, factor, whole)
            for number in range(counts[row, head]):
                position = indices[row, head, number]
                key = position - place.first * PAGE
                for reader in range(group):
                    if position >= place.since:
                        near[reader, position - place.since] = 0
                    elif 0 <= key < place.coded:
                        mass[reader, key] = 0
            for reader in range(group):
                total = share_left(place, mass, factor, reader) + total_of(near[reader])
                rest[row, head * group + reader] = np.log(total) + whole[reader]

    return judge_rows


_judge_rows = _kernel(sources())
