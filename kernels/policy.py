"""How a query row decides where to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.errors import KernelError
from kernels.page import PAGE

if TYPE_CHECKING:
    from kernels.patterns import Pattern


MAX_DRAWS = 4096
"""Most draws of a row and KV head: they are all held at once."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Attend to every visible key."""


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Attend to the fewest keys whose estimated attention mass reaches `coverage`.

    Where attention is spread evenly no few keys reach it, and more of them help little: there
    `worth` ends the choice.

    Attributes:
        coverage: target share of the softmax mass, mean over a group's query heads, 0 to 1.
        min_keys: fewest keys kept a row and KV head, when that many are visible.
        max_keys: most keys kept a row and KV head; sinks and the recent window (64 to 127 keys)
            count, but are kept even where they alone are more.
        worth: a key beyond `min_keys` must carry so many times the mass that it would have if all
            visible keys carried the same.
        sinks: keys at the start of the sequence that are always kept (Xiao et al. 2023,
            "Efficient Streaming Language Models with Attention Sinks").
        remainder: whether keys that are not selected count through their pages' mean values.
        draws: so many unselected values, drawn by their mass, correct these means; 0 for none.
        rescored: so many times `max_keys` keys of a long context are scored exactly, those with the
            best estimates.
        whole: contexts of at most so many keys are scored exactly throughout: to estimate first
            would save little time there.

    Raises:
        KernelError: when a field is outside its range.
    """

    coverage: float = 0.98
    min_keys: int = 256
    max_keys: int = 2048
    worth: float = 2.0
    sinks: int = 16
    remainder: bool = True
    draws: int = 256
    rescored: int = 2
    whole: int = 16_384

    def __post_init__(self) -> None:
        if not 0.0 < self.coverage <= 1.0:
            raise KernelError(f"coverage must lie in (0, 1], not {self.coverage}")
        if not 0 <= self.sinks <= PAGE:
            raise KernelError(f"sinks must lie in 0 to {PAGE}, not {self.sinks}")
        if not self.worth >= 0:
            raise KernelError(f"worth must not be negative, but is {self.worth}")
        if not 0 <= self.draws <= MAX_DRAWS:
            raise KernelError(f"draws must lie in 0 to {MAX_DRAWS}, not {self.draws}")
        if self.rescored < 1:
            raise KernelError(f"rescored must be at least 1, not {self.rescored}")
        if self.max_keys < 1:
            raise KernelError(f"max_keys must be at least 1, not {self.max_keys}")
        if not 0 <= self.min_keys <= self.max_keys:
            raise KernelError(f"min_keys must lie in 0 to max_keys, not {self.min_keys}")

    @property
    def candidates(self) -> int:
        """Most keys of a long context that are scored exactly, besides the recent window."""
        return max(self.rescored * self.max_keys, self.sinks)

    def scores_all(self, keys: int) -> bool:
        """Whether every one of `keys` keys is scored exactly."""
        return keys <= max(self.whole, self.candidates)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Attend to the keys that a pattern names, whatever they hold."""

    pattern: Pattern


Policy = Dense | Dynamic | Fixed
