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
    """Attend to the fewest keys whose estimated attention mass reaches `coverage`.

    Attributes:
        coverage: target share of the softmax mass, mean over a group's query heads, 0 to 1.
        min_keys: fewest keys kept a row and KV head, when that many are visible.
        max_keys: most keys kept a row and KV head; sinks and the recent window count.
        sinks: keys at the start of the sequence that are always kept (Xiao et al. 2023,
            "Efficient Streaming Language Models with Attention Sinks").
        survivors: share of a long context's pages whose keys are scored one by one.
        whole: contexts of at most so many keys are scored one by one throughout: the coarse level
            would save little time there, and it misses single sharp keys.

    Raises:
        KernelError: when a field is outside its range.
    """

    coverage: float = 0.98
    min_keys: int = 256
    max_keys: int = 1024
    sinks: int = 16
    survivors: float = 1 / 32
    whole: int = 16_384

    def __post_init__(self) -> None:
        if not 0.0 < self.coverage <= 1.0:
            raise KernelError(f"coverage must lie in (0, 1], not {self.coverage}")
        if not 0 <= self.sinks <= PAGE:
            raise KernelError(f"sinks must lie in 0 to {PAGE}, not {self.sinks}")
        if not 0.0 < self.survivors <= 1.0:
            raise KernelError(f"survivors must lie in (0, 1], not {self.survivors}")
        if self.max_keys < self.always_kept:
            raise KernelError(
                f"max_keys must be at least {self.always_kept} (the sinks and the recent window, "
                f"which are always kept), not {self.max_keys}"
            )
        if not 0 <= self.min_keys <= self.max_keys:
            raise KernelError(f"min_keys must lie in 0 to max_keys, not {self.min_keys}")

    @property
    def always_kept(self) -> int:
        """Most keys that the sinks and the recent window can hold."""
        return self.sinks + 2 * PAGE - 1

    def pages_scored(self, pages: int) -> int:
        """How many of `pages` complete pages have their keys scored one by one.

        In a long context never fewer than hold twice the budget, so that a budget of every
        key scores every page.
        """
        if pages * PAGE <= self.whole:
            return pages
        return min(pages, max(-int(-pages * self.survivors // 1), -(-2 * self.max_keys // PAGE)))


@dataclass(frozen=True, slots=True)
class Fixed:
    """Attend to the keys that a pattern names, whatever they hold."""

    pattern: Pattern


Policy = Dense | Dynamic | Fixed
