"""What a replica tells Ray Serve's autoscaling of its engine."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from service.autoscaling import ReplicaLoad

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.engine.types import Load


class Meter:
    """Reads an engine's load; what is a share of the time is one since the last reading.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._then = clock()
        self._prefilled = 0.0  # seconds in steps with prompt tokens until then

    def read(self, load: Load) -> dict[str, float]:
        """The metrics by name, the fields of `service.autoscaling.ReplicaLoad`."""
        now = self._clock()
        passed = now - self._then
        # A step counts when it ends, and may have begun before the last reading.
        prefill = min(1.0, (load.prefill_seconds - self._prefilled) / passed) if passed > 0 else 0.0
        self._then, self._prefilled = now, load.prefill_seconds
        occupancy = max(load.kv_usage, load.slots, prefill)
        return asdict(
            ReplicaLoad(load.queued_tokens, load.queued_prompts, load.kv_usage, occupancy)
        )
