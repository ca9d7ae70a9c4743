"""What is measured: so many sequences of the same length, on a device of known bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.page import PAGE

BANDWIDTHS = {"H200": 4.55, "H100": 3.2}
"""Terabytes a second that reading reaches, by what a device's name contains."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Sequences of the same length that decode together."""

    batch: int
    context: int  # keys in the cache

    @property
    def pages(self) -> int:
        """Pages of a sequence that goes on by one key."""
        return self.context // PAGE + 1


def bandwidth_of(machine: str) -> float | None:
    """Terabytes a second that a device of this name reads at best, where that is known."""
    return next((rate for name, rate in BANDWIDTHS.items() if name in machine), None)
