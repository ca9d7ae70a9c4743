"""`kernels.dynamic.select` for rows of one kind, in numba's kernels.

A thread takes one row and KV head after the other, from the scan of the codes to the choice, so
that the masses of all keys stay in its cache. Where there are fewer of them than threads, blocks of
keys are scanned in parallel first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.budget import SAMPLE
from kernels.codes import rotation, words
from kernels.cpu.choose import choose, score_near, share_left, unite
from kernels.cpu.cut import Budget
from kernels.cpu.keys import Keys, arrays, numbers, place_of
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.scan import BLOCK, level_query, load_query, scan_codes
from kernels.dynamic import Choice
from kernels.page import PAGE
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.timing import Phases

NEAR = 2 * PAGE
"""Keys of the recent window, those included that are not written yet."""


def select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Choice:
    """Choose keys; see `kernels.dynamic.select`. Queries are of float32 or bfloat16."""
    count, heads, head_dim = query.shape
    kv_heads = cache.kv_heads
    group, units = heads // kv_heads, count * kv_heads
    pages = int((rows.recent_page - rows.starts // PAGE).max().clamp_min(0))
    most = int(rows.visible.max())
    fewest = NEAR + policy.sinks + (SAMPLE if policy.sampled else 0)
    capacity = min(most, max(policy.max_keys, fewest))
    indices = torch.empty(count, kv_heads, capacity, dtype=torch.int64)
    counts = torch.empty(count, kv_heads, dtype=torch.int64)
    weights = torch.empty(count, kv_heads, capacity if policy.sampled else 0)
    missing, unit = torch.empty(count, heads), torch.empty(count, heads)
    budget = Budget(
        policy.coverage, policy.worth, policy.min_keys, policy.max_keys, policy.sinks,
        policy.sampled,
    )  # fmt: skip
    threads = torch.get_num_threads()
    blocks = -(-pages // BLOCK)
    # A timed step and one of few units scan first and then choose.
    apart = phases.on or (units % threads > 0 and units < 4 * threads)
    slots = units if apart else min(threads, units)
    mass = torch.empty(slots, group, pages * PAGE)
    peak = torch.empty(slots, 2, group, blocks)
    shared = (
        arrays(cache, rows), numbers(query),
        rotation(head_dim, torch.float32, query.device).numpy(), np.float32(scale),
        words(head_dim), mass.numpy(), peak.numpy(),
    )  # fmt: skip
    outputs = (
        indices.numpy(), counts.numpy(), weights.numpy(), missing.numpy(), unit.numpy(),
    )  # fmt: skip
    with phases.time("score", query.device):
        if apart:
            in_threads(_scan_blocks, shared, units * blocks)
    with phases.time("select", query.device):
        in_threads(_select_rows, (*shared, apart, budget, *outputs), units)
    selection = Selection(indices, counts, weights if policy.sampled else None)
    return Choice(selection, missing, unit)


def _kernels(version: int) -> tuple[Any, Any]:
    """The two kernels; see `sources` for the version."""

    @entry
    def scan_blocks(
        keys: Keys, queries: Any, rotated: Any, scale: Any, words_: int, mass: Any, peak: Any,
        _part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Blocks `start` to `stop` of all rows and KV heads."""
        _ = version
        rows, group, blocks = queries.shape[0], peak.shape[2], peak.shape[3]
        query = np.empty((group, queries.shape[2]), np.float32)
        planes = np.empty((group, 4, words_), np.int64)
        level = np.empty((3, group), np.float32)
        known, place = -1, place_of(keys, 0, 0)
        for number in range(start, stop):
            unit, block = number // blocks, number % blocks
            if unit != known:
                known, head, row = unit, unit // rows, unit % rows
                place = place_of(keys, head, row)
                load_query(queries, row, head * group, scale, query)
                level_query(query, rotated, planes, level)
            scan_codes(
                keys, place, (block, block + 1), query, planes, level, mass[unit], peak[unit]
            )

    @entry
    def select_rows(
        keys: Keys, queries: Any, rotated: Any, scale: Any, words_: int, mass: Any, peak: Any,
        scanned: bool, budget: Budget, indices: Any, counts: Any, weights: Any, missing: Any,
        unit: Any, part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Rows and KV heads `start` to `stop`, head by head: rows of one share what they read."""
        _ = version
        rows, group = queries.shape[0], peak.shape[2]
        query = np.empty((group, queries.shape[2]), np.float32)
        planes = np.empty((group, 4, words_), np.int64)
        level = np.empty((3, group), np.float32)
        for number in range(start, stop):
            head, row = number // rows, number % rows
            place = place_of(keys, head, row)
            blocks = (place.coded // PAGE + BLOCK - 1) // BLOCK
            own = mass[number if scanned else part]
            peaks = peak[number if scanned else part]
            load_query(queries, row, head * group, scale, query)
            if not scanned:
                level_query(query, rotated, planes, level)
                scan_codes(keys, place, (0, blocks), query, planes, level, own, peaks)
            factor = np.empty((group, blocks), np.float32)
            near = score_near(keys, place, query)
            unite(near, peaks, factor, unit[row, head * group : head * group + group])
            counts[row, head] = choose(
                place, budget, near, own, factor, indices[row, head], weights[row, head]
            )
            for reader in range(group):
                missing[row, head * group + reader] = share_left(place, own, factor, reader)

    return scan_blocks, select_rows


_scan_blocks, _select_rows = _kernels(sources())
