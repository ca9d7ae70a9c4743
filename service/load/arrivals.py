"""When the requests of an open loop are due: independent of how the server does."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

KINDS = ("poisson", "constant")


def arrivals(kind: str, rate: float, rng: np.random.Generator) -> Iterator[float]:
    """Times without end, in seconds since the start.

    Args:
        kind: "poisson", exponential gaps of mean 1 / rate; or "constant", every 1 / rate.
        rate: requests a second, over 0.
        rng: of the gaps.

    Raises:
        ConfigError: there is no such kind, or no such rate.
    """
    if kind not in KINDS:
        raise ConfigError(f"there are no arrivals called {kind!r}: choose from {', '.join(KINDS)}")
    if not 0 < rate < 1e6:
        raise ConfigError(f"a rate must be requests a second, over 0, not {rate:g}")
    if kind == "constant":
        return (number / rate for number in itertools.count())
    return itertools.accumulate(rng.exponential(1 / rate) for _ in itertools.count())
