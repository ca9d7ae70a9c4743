"""How long something takes on a device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def seconds_of(way: Callable[[], object], device: torch.device) -> float:
    """Seconds that `way` takes: on a GPU between events around it, which the call waits for."""
    if device.type != "cuda":
        begin = time.perf_counter()
        way()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    way()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
