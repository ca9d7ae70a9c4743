"""How many replicas the engines' load needs: Ray Serve's policy for autoscaling.

More replicas follow from what waits: prompt tokens not yet prefilled, and the KV cache. Fewer
follow only from a whole window in which fewer could have held the load with room to spare: the
largest need of the window counts, so that one quiet moment takes nothing away (the stabilization
window of Kubernetes' Horizontal Pod Autoscaler).

Serve's controller gets this module by value and may not have Saccade: it imports nothing of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray.serve.config import AutoscalingContext

POLICY = "service.autoscaling:LoadPolicy"
"""Import path for Serve's configuration."""
ROOM = 0.7
"""Share of a limit up to which the replicas that remain may be loaded when one goes."""


@dataclass(frozen=True)
class Limits:
    """What a replica may have to do, and how long it takes to believe it; seconds."""

    queued_tokens_per_replica: float
    kv_usage: float
    upscale_delay_s: float
    downscale_delay_s: float


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica reports.

    Attributes:
        queued_tokens: prompt tokens not yet prefilled.
        queued_prompts: prompts that they belong to.
        kv_usage: share of its KV cache in use, 0 to 1.
        occupancy: how busy it is, 0 to 1: the largest share of its KV cache, of its sequences, and
            of its time that goes into prompts.
    """

    queued_tokens: float
    queued_prompts: float
    kv_usage: float
    occupancy: float


@dataclass(frozen=True)
class Window:
    """What a policy remembers between decisions; times in seconds.

    Attributes:
        since: first decision.
        above: since when more replicas are needed than there are to be; None: they are not.
        peaks: (time, replicas) of the last window, each the largest need from its time on; newest
            last, so that needs fall and there are no more entries than replicas.
    """

    since: float
    above: float | None = None
    peaks: tuple[tuple[float, int], ...] = ()


def needed(loads: Sequence[ReplicaLoad], limits: Limits) -> int:
    """Replicas over which the load stays within the limits."""
    return _count(loads, limits, 1.0, 0.0)


def sufficient(loads: Sequence[ReplicaLoad], limits: Limits) -> int:
    """The fewest replicas that would hold the load with room to spare; at least `needed`."""
    busy = sum(load.occupancy for load in loads) / ROOM
    return _count(loads, limits, ROOM, busy)


def _count(loads: Sequence[ReplicaLoad], limits: Limits, share: float, least: float) -> int:
    tokens = sum(load.queued_tokens for load in loads)
    # A prompt is prefilled by one replica: more replicas than prompts would find nothing to do.
    prompts = sum(load.queued_prompts for load in loads)
    by_tokens = min(tokens / (share * limits.queued_tokens_per_replica), prompts)
    by_cache = sum(load.kv_usage for load in loads) / (share * limits.kv_usage)
    # Sums of shares that are whole but for their rounding.
    return max(1, math.ceil(max(by_tokens, by_cache, least) - 1e-9))


def decide(
    now: float,
    target: int,
    loads: Sequence[ReplicaLoad],
    complete: bool,
    window: Window | None,
    limits: Limits,
) -> tuple[int, Window]:
    """The number of replicas to have, before any bounds, and what to remember.

    Args:
        now: seconds.
        target: number of replicas that there are to be so far.
        loads: what is known of them.
        complete: whether all of them run and report; else none is taken away.
        window: what the last decision returned; None at first.
        limits: of a replica's load.
    """
    window = window or Window(now)
    need = needed(loads, limits)
    hold = sufficient(loads, limits) if complete else max(target, need)
    start = now - limits.downscale_delay_s
    recent = [(when, peak) for when, peak in window.peaks if when >= start and peak > hold]
    peaks = (*recent, (now, hold))
    if need > target:
        above = now if window.above is None else window.above
        if now - above >= limits.upscale_delay_s:
            return need, Window(window.since, None, peaks)
        return target, Window(window.since, above, peaks)
    # Before a whole window has been seen, it may have had any need.
    fewer = peaks[0][1] if window.since <= start else target
    return min(target, fewer), Window(window.since, None, peaks)


class LoadPolicy:
    """The policy as Serve calls it, some ten times a second.

    Args:
        limits: of a replica's load, the fields of `Limits`.
    """

    def __init__(self, **limits: float) -> None:
        self._limits = Limits(**limits)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas to have, and the state for the next call."""
        reported = context.raw_metrics or {}
        loads = []
        for replica in context.running_replicas:
            # By replica: (timestamp, value), oldest first.
            series = [reported.get(name, {}).get(replica) for name in FIELDS]
            if all(series):
                loads.append(ReplicaLoad(*(one[-1].value for one in series if one)))
        target = context.target_num_replicas
        complete = len(loads) == len(context.running_replicas) == target
        now = float(context.current_time or 0.0)
        window = context.policy_state.get("window")
        number, window = decide(now, target, loads, complete, window, self._limits)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(low, min(high, number)), {"window": window}


FIELDS = tuple(ReplicaLoad.__dataclass_fields__)
"""Names of the metrics that replicas report."""
