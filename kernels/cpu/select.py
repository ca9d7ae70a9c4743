"""`kernels.dynamic.select` in numba's kernels.

Three stages for each row and KV head: a first look at a few keys, the budget, and the scan of all
codes, in which each page's keys are drawn as soon as they are scored. A thread takes one row and KV
head after the other; where there are too few of them to go round, their segments are shared out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.codes import rotation
from kernels.cpu import stages
from kernels.cpu.budget import Budget
from kernels.cpu.keys import Keys, arrays, numbers
from kernels.cpu.launch import in_threads
from kernels.cpu.work import Work
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.timing import Phases

TO_PACK = 64
"""Fewest rows and KV heads whose keys are laid out in threads: to wake one takes as long."""


def select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Selection:
    """Draw keys; see `kernels.dynamic.select`. Queries are of float32 or bfloat16.

    Keys are drawn while they are scored: what is timed as selection only lays them out.
    """
    budget = Budget(policy.coverage, policy.worth, policy.min_keys, policy.max_keys, policy.sinks)
    keys, kv_heads = arrays(cache, rows), cache.kv_heads
    shared = (keys, Work.of(keys, kv_heads, query.shape[1] // kv_heads), budget)
    with phases.time("score", query.device):
        rotated = rotation(cache.head_dim, torch.float32, query.device).numpy()
        _draw(shared, numbers(query), rotated, np.float32(scale))
    with phases.time("select", query.device):
        return _packed(shared, query.shape[0], kv_heads)


def _draw(shared: tuple[Keys, Work, Budget], query: Any, rotated: Any, scale: Any) -> None:
    """Draw the keys of every unit."""
    units, segments = shared[1].count.shape
    threads = torch.get_num_threads()
    if units % threads > 0 and units < 4 * threads:
        in_threads(stages.probe, (*shared, query, rotated, scale), units * segments)
        in_threads(stages.settle, (*shared, query, scale), units)
        in_threads(stages.draw, shared, units * segments)
        return

    def in_turn(part: int, start: int, stop: int) -> None:
        first, last = start * segments, stop * segments
        stages.probe(*shared, query, rotated, scale, part, first, last)
        stages.settle(*shared, query, scale, part, start, stop)
        stages.draw(*shared, part, first, last)

    in_threads(in_turn, (), units)


def _packed(shared: tuple[Keys, Work, Budget], rows: int, kv_heads: int) -> Selection:
    """Lay out what was drawn."""
    counts = torch.empty(rows, kv_heads, dtype=torch.int64)
    work = shared[1]
    capacity = int((work.count.sum(1) + work.always).max(initial=0))
    indices = torch.empty(rows, kv_heads, capacity, dtype=torch.int64)
    weights = torch.empty(indices.shape)
    outputs = (indices.numpy(), weights.numpy(), counts.numpy())
    in_threads(stages.pack, (*shared, *outputs), rows * kv_heads, TO_PACK)
    return Selection(indices, counts, weights)
