"""What a level of brownout leaves of a request's budget; pure Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from kernels.budget import SAMPLE

if TYPE_CHECKING:
    from service.engine.types import SparsityParams


@dataclass(frozen=True, slots=True)
class Levels:
    """What is cut, level by level: 1 is the first, 0 is nothing."""

    halvings: int = 0  # levels that halve budgets, each once more
    fixed: bool = False  # whether one more level puts the fixed pattern in their place

    @property
    def last(self) -> int:
        """The highest level."""
        return self.halvings + self.fixed


def halvings_of(max_keys: int) -> int:
    """How many levels it takes to halve a budget down to the fewest keys of a sample."""
    return max(0, (-(-max_keys // SAMPLE) - 1).bit_length())


@lru_cache
def cut_of(
    wanted: SparsityParams, priority: int, level: int, levels: Levels
) -> SparsityParams | None:
    """What is left of `wanted`; None where nothing is cut: a function of these alone.

    A budget is halved down to `SAMPLE` keys and not beyond: fewer would know too little of those
    that they stand for. What is smaller by itself stays. The fixed pattern is not for requests with
    a floor of coverage, as nothing would tell whether it is kept: they stay at the smallest budget.

    Args:
        wanted: the request's own.
        priority: of the request. Each step above 0 is reached one level sooner, each below it one
            later, or not at all.
        level: of the service.
        levels: what they cut.
    """
    reached = min(levels.last, max(0, level + priority)) if level > 0 else 0
    if reached == 0 or not wanted.allow_brownout or wanted.policy != "dynamic":
        return None
    if levels.fixed and reached == levels.last and wanted.min_coverage == 0:
        return replace(wanted, policy="fixed")
    halvings = min(reached, levels.halvings)
    most = _halved(wanted.max_keys, halvings)
    cut = replace(wanted, max_keys=most, min_keys=min(most, _halved(wanted.min_keys, halvings)))
    return None if cut == wanted else cut


def _halved(keys: int, times: int) -> int:
    return max(min(keys, SAMPLE), keys >> times)
