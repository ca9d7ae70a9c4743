"""`kernels.dynamic.select` for rows of one kind, in numba's kernels.

A thread takes one row and KV head after the other, from the scan of the keys to the remainder, so
that the masses of all keys stay in its cache. Where there are fewer of them than threads, blocks of
keys are scanned in parallel first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.codes import rotation, words
from kernels.cpu.candidates import rank_keys
from kernels.cpu.choose import (
    choose_of_all,
    choose_of_likely,
    mean_left,
    score_near,
    unite,
)
from kernels.cpu.cut import Budget
from kernels.cpu.draw import correct
from kernels.cpu.keys import Keys, arrays, numbers, place_of
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.scan import BLOCK, level_query, load_query, scan_codes, scan_keys
from kernels.page import PAGE
from kernels.scores import keys_of_pages
from kernels.selection import Selection
from kernels.torch_backend import prescaled

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.timing import Phases

NEAR = 2 * PAGE
"""Keys of the recent window, those included that are not written yet."""
MANY = 4
"""Rows of a sequence from which on one product scores its keys faster than each row's own."""


def select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases,
    *, whole: bool,
) -> tuple[Selection, Tensor, Tensor | None]:  # fmt: skip
    """Choose keys.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype: float32 or bfloat16.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.
        whole: whether all keys are scored exactly.

    Returns:
        The selection; float32 [rows, heads], the log of the mass left out; and, where the policy
        wants it, float32 [rows, heads, head_dim], the mean value of what was left out.
    """
    count, heads, head_dim = query.shape
    kv_heads = cache.kv_heads
    group, units = heads // kv_heads, count * kv_heads
    pages = int((rows.recent_page - rows.starts // PAGE).max().clamp_min(0))
    most = int(rows.visible.max())
    capacity = min(most, max(policy.max_keys, NEAR + policy.sinks))
    indices = torch.empty(count, kv_heads, capacity, dtype=torch.int64)
    counts = torch.empty(count, kv_heads, dtype=torch.int64)
    rest = torch.empty(count, heads)
    mean = torch.empty(count if policy.remainder else 0, heads, head_dim)
    budget = Budget(
        policy.coverage, policy.worth, policy.min_keys, policy.max_keys, policy.sinks,
        policy.candidates, policy.remainder, policy.draws,
    )  # fmt: skip
    threads = torch.get_num_threads()
    blocks = -(-pages // BLOCK)
    # One product scores a sequence's keys for many rows; they must begin with the same page.
    scored = whole and rows.queries >= MANY and not bool(rows.starts.any())
    # A timed step and one of few units scan first and then choose.
    apart = phases.on or scored or (units % threads > 0 and units < 4 * threads)
    slots = units if apart else min(threads, units)
    mass = torch.empty(slots, group, pages * PAGE)
    peak = torch.empty(slots, 2, group, blocks)
    scan_blocks, select_rows = _OF_KEYS if whole else _OF_CODES
    shared = (
        arrays(cache, rows), numbers(query),
        rotation(head_dim, torch.float32, query.device).numpy(), np.float32(scale),
        words(head_dim), scored, mass.numpy(), peak.numpy(),
    )  # fmt: skip
    outputs = (indices.numpy(), counts.numpy(), rest.numpy(), mean.numpy())
    with phases.time("score", query.device):
        if scored:
            _multiply(query, cache, rows, scale, mass.view(kv_heads, count, group, -1))
        if apart:
            in_threads(scan_blocks, shared, units * blocks)
    with phases.time("select", query.device):
        in_threads(select_rows, (*shared, apart, budget, *outputs), units)
    return Selection(indices, counts), rest, mean if policy.remainder else None


def _multiply(query: Tensor, cache: LayerCache, rows: Rows, scale: float, scores: Tensor) -> None:
    """Exact scores, to `scores` [kv_heads, rows, group, keys]: of many rows a sequence at once."""
    small, left = prescaled(query, scale)
    kv_heads, _, group, _ = scores.shape
    grouped = small.view(rows.sequences, rows.queries, kv_heads, group, -1)
    for sequence in range(rows.sequences):
        part = slice(sequence * rows.queries, (sequence + 1) * rows.queries)
        last = int(rows.recent_page[part].max())
        stored = keys_of_pages(cache, rows.block_tables[sequence, :last])
        for head in range(kv_heads):
            own = grouped[sequence, :, head].reshape(rows.queries * group, -1)
            # In float32, whatever the cache's dtype: as a row alone is scored.
            product = (own.float() @ stored[head].float().T).view(rows.queries, group, -1)
            torch.mul(product, left, out=scores[head, part, :, : last * PAGE])


def _kernels(version: int, whole: bool) -> tuple[Any, Any]:
    """The two kernels; see `sources` for the version.

    Each is compiled for exact or for estimated masses: a service of short contexts never waits for
    the other.
    """

    @entry
    def scan_blocks(
        keys: Keys, queries: Any, rotated: Any, scale: Any, words_: int, scored: bool, mass: Any,
        peak: Any, _part: int, start: int, stop: int,
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
            head, row = unit // rows, unit % rows
            if unit != known:
                known = unit
                place = place_of(keys, head, row)
                load_query(queries, row, head * group, scale, query)
                if not whole:
                    level_query(query, rotated, planes, level)
            some = (block, block + 1)
            if whole:
                scan_keys(keys, place, some, scored, query, mass[unit], peak[unit])
            else:
                scan_codes(keys, place, some, query, planes, level, mass[unit], peak[unit])

    @entry
    def select_rows(
        keys: Keys, queries: Any, rotated: Any, scale: Any, words_: int, scored: bool, mass: Any,
        peak: Any, scanned: bool, budget: Budget, indices: Any, counts: Any, rest: Any, mean: Any,
        part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Rows and KV heads `start` to `stop`, head by head: rows of one share what they read."""
        _ = version
        rows, group = queries.shape[0], peak.shape[2]
        query = np.empty((group, queries.shape[2]), np.float32)
        planes = np.empty((group, 4, words_), np.int64)
        level = np.empty((3, group), np.float32)
        top, share = np.empty(group, np.float32), np.empty(group, np.float32)
        unit_share = np.empty(group, np.float32)
        for unit in range(start, stop):
            head, row = unit // rows, unit % rows
            place = place_of(keys, head, row)
            pages = place.coded // PAGE
            blocks = (pages + BLOCK - 1) // BLOCK
            own = mass[unit if scanned else part]
            peaks = peak[unit if scanned else part]
            load_query(queries, row, head * group, scale, query)
            if whole:
                if not scanned:
                    scan_keys(keys, place, (0, blocks), scored, query, own, peaks)
            elif not scanned:
                level_query(query, rotated, planes, level)
                scan_codes(keys, place, (0, blocks), query, planes, level, own, peaks)
            factor = np.empty((group, blocks), np.float32)
            weight = np.empty((group, blocks), np.float32)
            left = np.empty((group, pages), np.float32)
            rank = np.empty(place.coded, np.int32)
            scores = score_near(keys, place, query)
            near = scores.copy()
            unite(near, peaks, top, factor, share, weight)
            rank_keys(own, weight, rank)
            target = indices[row, head]
            rests = rest[row, head * group : head * group + group]
            if whole:
                chosen = choose_of_all(
                    place, budget, rank, near, own, top, factor, share, left, target, rests
                )
            else:
                chosen = choose_of_likely(
                    keys, place, query, budget, rank, scores, own, top, factor, share, left,
                    target, rests,
                )  # fmt: skip
            for position in range(place.since, place.length):
                target[chosen] = position
                chosen += 1
            counts[row, head] = chosen
            for empty in range(chosen, target.shape[0]):
                target[empty] = -1
            if budget.remainder:
                means = mean[row, head * group : head * group + group]
                mean_left(keys, place, left, unit_share, means)
                if budget.draws > 0:
                    correct(keys, place, budget.draws, own, factor, unit_share, left, means)

    return scan_blocks, select_rows


_OF_CODES, _OF_KEYS = _kernels(sources(), False), _kernels(sources(), True)
