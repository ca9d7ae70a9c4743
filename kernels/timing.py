"""Seconds by phase, for the sampled steps that are timed from inside."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class Phases:
    """Adds up what `score`, `select` and `attend` take; off, it costs and notes nothing.

    On a GPU each phase waits for the device, so timed steps are few.
    """

    on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def time(self, name: str, device: torch.device) -> Iterator[None]:
        """Note how long the block takes."""
        if not self.on:
            yield
            return
        _wait(device)
        start = time.perf_counter()
        yield
        _wait(device)
        self.seconds[name] += time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
