"""Objectives that a request must meet to count as good."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.load.outcome import Outcome

MEASURES = {
    "ttft": "seconds to the first token",
    "itl": "95th percentile of the seconds between its tokens",
    "tpot": "seconds a token behind the first",
    "e2e": "seconds to the last token",
}


@dataclass(frozen=True, slots=True)
class Objective:
    """At most `seconds` of a request's `measure`, one of `MEASURES`."""

    measure: str
    seconds: float

    def met(self, outcome: Outcome) -> bool:
        """Whether a request that succeeded meets it; what has no such measure does."""
        if self.measure == "itl":
            gaps = outcome.gaps
            return not gaps or float(np.percentile(gaps, 95)) <= self.seconds
        value = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2e": outcome.e2e}[self.measure]
        return value is None or value <= self.seconds


def parse_objective(text: str) -> Objective:
    """An objective such as `ttft:2.0`.

    Raises:
        ConfigError: it is none.
    """
    measure, _, seconds = text.partition(":")
    try:
        limit = float(seconds)
    except ValueError:
        limit = math.nan
    if measure not in MEASURES or not 0 < limit < math.inf:
        raise ConfigError(
            f"--slo must be a measure and seconds, such as ttft:2.0, not {text!r}; measures are "
            + ", ".join(MEASURES)
        )
    return Objective(measure, limit)


def good(outcome: Outcome, objectives: Sequence[Objective]) -> bool:
    """Whether a request succeeded and met them all."""
    return outcome.error is None and all(objective.met(outcome) for objective in objectives)
