"""How a query row decides where to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.errors import KernelError
from kernels.page import PAGE

if TYPE_CHECKING:
    from kernels.patterns import Pattern


@dataclass(frozen=True, slots=True)
class Dense:
    """Attend to every visible key."""


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Attend to as many keys as the fewest whose estimated attention mass reaches `coverage`.

    Which keys these are is drawn by their mass (`kernels.sample`): they carry a little less of it,
    and stand for the rest too. Where attention is spread evenly no few keys reach the target, and
    more of them help little: there `worth` ends the choice.

    Attributes:
        coverage: target share of the softmax mass, mean over a group's query heads, 0 to 1.
        min_keys: fewest keys kept a row and KV head, when that many are visible.
        max_keys: most keys kept a row and KV head; sinks and the recent window (64 to 127 keys)
            count, but are kept even where they alone are more, and a sample has 240 others.
        worth: beyond `min_keys` so many keys are kept as carry so many times the mass that each
            would have if all visible keys carried the same.
        sinks: keys at the start of the sequence that are always kept (Xiao et al. 2023,
            "Efficient Streaming Language Models with Attention Sinks").
        sampled: whether keys are drawn, and stand for others; else those of the greatest mass are
            taken, and nothing stands for the rest: plain top-k.

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


@dataclass(frozen=True, slots=True)
class Fixed:
    """Attend to the keys that a pattern names, whatever they hold."""

    pattern: Pattern


Policy = Dense | Dynamic | Fixed
