"""How a query row decides where to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.errors import KernelError
from kernels.page import PAGE

if TYPE_CHECKING:
    from kernels.patterns.pattern import Pattern

MOST_KEYS = 2**24
"""Largest budget that float32 holds exactly; no context is that long."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Attend to every visible key."""


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Attend to a sample of the keys, drawn by their estimated attention mass (`kernels.sample`).

    A row's line gets a number of marks between two bounds: twice as many until `coverage` is
    reached. Where attention is spread evenly no few keys reach it, and more of them help little:
    there `worth` ends it.

    Attributes:
        coverage: share of the softmax mass that the keys read should carry, by the estimates,
            mean over a group's query heads, 0 to 1.
        min_keys: how fine the sample is at the least: a key that carries about 1 / `min_keys` of
            the mass is read for certain. Where few keys carry the mass fewer than these are read.
        max_keys: about how many keys a row and KV head reads at the most. Sinks and the recent
            window (64 to 127 keys) count toward both bounds, and each other key for a mark. The
            shares by which keys are drawn are estimates, so that some per cent more may be read.
            A sample has `kernels.budget.SAMPLE` marks at least, whatever the bounds say.
        worth: marks are doubled only where the keys that this adds carry on average so many times
            the mass that each would have if all visible keys carried the same.
        sinks: keys at the start of the sequence that are always kept (Xiao et al. 2023,
            "Efficient Streaming Language Models with Attention Sinks").
        sampled: whether keys are drawn, and stand for others; else as many keys as there would be
            marks are taken, those of the greatest mass, and nothing stands for the rest: plain
            top-k, whose bounds are exact.

    Raises:
        KernelError: when a field is outside its range.
    """

    coverage: float = 0.98
    min_keys: int = 384
    max_keys: int = 1024
    worth: float = 2.0
    sinks: int = 16
    sampled: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.coverage <= 1.0:
            raise KernelError(f"coverage must lie in (0, 1], not {self.coverage}")
        if not 0 <= self.sinks <= PAGE:
            raise KernelError(f"sinks must lie in 0 to {PAGE}, not {self.sinks}")
        if not self.worth >= 0:
            raise KernelError(f"worth must not be negative, but is {self.worth}")
        if self.max_keys < 1:
            raise KernelError(f"max_keys must be at least 1, not {self.max_keys}")
        if not 0 <= self.min_keys <= self.max_keys:
            raise KernelError(
                f"min_keys must lie in 0 to max_keys ({self.max_keys}), not {self.min_keys}"
            )

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """Coverage, worth, fewest and most keys: what kernels read of a row's policy as numbers.

        All else decides which kernels are launched, and is the same for all rows of a launch.
        """
        fewest, most = min(self.min_keys, MOST_KEYS), min(self.max_keys, MOST_KEYS)
        return self.coverage, self.worth, float(fewest), float(most)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Attend to the keys that a pattern names, whatever they hold.

    Attributes:
        pattern: which keys.
        judged: whether the mass that they carry is estimated; else it counts as unknown.
    """

    pattern: Pattern
    judged: bool = True


@dataclass(frozen=True, slots=True)
class Pages:
    """Of a prompt: read whole pages by content, and the means of the others (`kernels.prefill`).

    Attributes:
        coverage: 1 less what is lost of a query's attention mass where 64 pages are left to their
            means that are just not worth reading.

    Raises:
        KernelError: when it is outside 0 to 1.
    """

    coverage: float = 0.98

    def __post_init__(self) -> None:
        if not 0.0 < self.coverage <= 1.0:
            raise KernelError(f"coverage must lie in (0, 1], not {self.coverage}")

    @property
    def least(self) -> float:
        """Share of a query's mass from which on a page's error is too much.

        Errors of pages are independent: those of 64 make eight times that of one.
        """
        return (1.0 - self.coverage) / 8


Policy = Dense | Dynamic | Fixed
