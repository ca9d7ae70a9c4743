"""What the engine reports of its tokens and requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from service.engine.sequence import State

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from service.engine.output import Ending
    from service.engine.sequence import Sequence
    from service.engine.tally import Looked
    from service.metrics import Metrics


def observe(metrics: Metrics, looked: Seq[Looked]) -> None:
    """One observation a layer group of what the step's tail and decode tokens looked at."""
    layers = looked[0].density.shape[0]
    third = max(1, layers // 3)
    groups = {
        "first": slice(0, third),
        "middle": slice(third, layers - third),
        "last": slice(layers - third, layers),
    }
    for name, part in groups.items():
        rows = sum(entry.density[part].size for entry in looked)
        if rows == 0:
            continue
        metrics.attention(
            name,
            sum(float(entry.density[part].sum()) for entry in looked) / rows,
            sum(float(entry.coverage[part].mean(-1).sum()) for entry in looked) / rows,
            sum(float(entry.keys[part].sum()) for entry in looked) / rows,
        )
        errors = [
            (entry.coverage[part] - entry.exact[part]).mean(-1).ravel()
            for entry in looked
            if entry.exact is not None
        ]
        if errors:
            metrics.audited(name, float(np.concatenate(errors).mean()))


def longest_wait(waiting: Seq[Sequence]) -> float:
    """Seconds since the first of those in the queue came that have not run; 0: there are none.

    Those of a priority above 0 do not count: they wait for others by their own will, and a backlog
    of them would be at the cost of all.
    """
    arrived = [
        one.request.arrived for one in waiting if one.started is None and one.request.priority <= 0
    ]
    return time.monotonic() - min(arrived) if arrived else 0.0


def time_token(metrics: Metrics, sequence: Sequence) -> float | None:
    """A token's time since the one before, or since the request came.

    Returns:
        Seconds since the one before; None: it is the first.
    """
    now, gap = time.monotonic(), None
    if sequence.last_token is None:
        sequence.first_token = now
        if sequence.index == 0:
            metrics.first_token(now - sequence.request.arrived)
    else:
        gap = now - sequence.last_token
        metrics.inter_token(gap)
    sequence.last_token = now
    return gap


def time_end(metrics: Metrics, sequence: Sequence, ending: Ending) -> None:
    """A request's phases, once, when its last choice ends."""
    request = sequence.request
    if any(choice.state is not State.FINISHED for choice in request.sequences):
        return
    now = time.monotonic()
    lead = request.sequences[0]
    started = lead.started or now
    first_token = lead.first_token or now
    metrics.finished(
        ending.reason,
        e2e=now - request.arrived,
        queue=started - request.arrived,
        prefill=first_token - started,
        decode=now - first_token,
    )
