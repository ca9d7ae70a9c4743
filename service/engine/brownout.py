"""How far budgets are cut under overload: from what users feel to a level; pure Python, no clock.

Brownout (Klein, Maggio, Årzén and Hernández-Rodriguez 2014, "Brownout: Building More Robust Cloud
Applications"): under overload all answers get a little worse, so that none comes too late. What
users feel is how long requests wait and how long a token takes; the engine tells both. The level
rises while one of them is over its target, and does not get better, and falls after a calm time. A
fall that was too early makes the next one wait longer, as a sender waits that is refused: under a
load that lasts the level stays, but for rarer and rarer tries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.engine.cuts import Levels, cut_of

if TYPE_CHECKING:
    from service.engine.sequence import Sequence
    from service.engine.types import SparsityParams

WINDOW = 1.0
"""Seconds that are looked at together."""
SETTLE = 3.0
"""Seconds in which a level shows what it does before the next one is taken."""
RELIEF = 0.5
"""Pressure below which a lower level is tried; from there to 1 the level stays."""
MOST = 16
"""Times `calm` that a fall waits at the most, and within which a rise calls it too early."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What users should feel at the most, all in seconds."""

    wait: float  # of a request in the queue, from its arrival on
    gap: float  # between two tokens of a sequence, mean over a window's tokens
    calm: float = 10.0  # without pressure, until the level falls by one


class Brownout:
    """The controller of one engine, for the engine's thread.

    Pressure is the greater of wait and gap over their targets. A second with more than 1 that is
    not less than the second before raises the level, by one in `SETTLE` seconds. It falls by one
    after `calm` seconds of no pressure at all, or of less than `RELIEF` for as long as it takes:
    `calm` seconds at first, twice as long each time that the level had to rise again within `MOST`
    times `calm` of a fall, up to that. So it is back at 0 when the load has been gone for
    `levels.last` times `calm` seconds, and in any case after `MOST` times as long below `RELIEF`.

    Args:
        targets: what users should feel at the most.
        levels: what there is to cut; nothing by default: the level is always 0.
    """

    def __init__(
        self,
        targets: Targets = Targets(math.inf, math.inf),
        levels: Levels = Levels(),  # noqa: B008  frozen
    ) -> None:
        self.level = 0
        self._targets, self._levels = targets, levels
        # Of the window: its start, the longest wait, the sum of its gaps, and how many there are.
        self._begun: float | None = None
        self._waited, self._gaps, self._tokens = 0.0, 0.0, 0
        self._before = 0.0  # pressure of the window before
        self._patience = targets.calm
        # When: pressure was last there, was last too much to fall, the level last rose or fell.
        self._idle = self._strained = 0.0
        self._rose = -math.inf
        self._fell: float | None = None  # None: it has risen again

    def cut(self, sequence: Sequence) -> SparsityParams | None:
        """What is left of the sequence's budget at this level; None: all."""
        if self.level == 0 or sequence.spared:
            return None
        request = sequence.request
        return cut_of(request.sparsity, request.priority, self.level, self._levels)

    def token(self, gap: float | None) -> None:
        """A token came so many seconds after the one before it; None: it is the first."""
        if gap is not None:
            self._gaps += gap
            self._tokens += 1

    def observe(self, now: float, waited: float) -> None:
        """Look at the last second, where it is over.

        Args:
            now: seconds, of any clock that goes forward.
            waited: seconds that the request in the queue has waited which has the longest; 0: none.
        """
        if self._begun is None:
            self._begun = self._idle = self._strained = now
        self._waited = max(self._waited, waited)
        if now - self._begun < WINDOW:
            return
        gap = self._gaps / max(self._tokens, 1)
        pressure = max(self._waited / self._targets.wait, gap / self._targets.gap)
        self._begun, self._waited, self._gaps, self._tokens = now, 0.0, 0.0, 0
        self._weigh(now, pressure)
        self._before = pressure

    def _weigh(self, now: float, pressure: float) -> None:
        if pressure > 0:
            self._idle = now
        if pressure >= RELIEF:
            self._strained = now
        late = pressure > 1 and pressure >= self._before
        if late and self.level < self._levels.last and now - self._rose >= SETTLE:
            self._rise(now)
        elif self.level > 0 and (
            now - self._strained >= self._patience or now - self._idle >= self._targets.calm
        ):
            self.level -= 1
            self._fell = self._idle = self._strained = now

    def _rise(self, now: float) -> None:
        longest = MOST * self._targets.calm
        if self._fell is not None:
            early = now - self._fell < longest
            self._patience = min(2 * self._patience, longest) if early else self._targets.calm
            self._fell = None
        self.level += 1
        self._rose = now
