"""What does not run as it should at present."""

from __future__ import annotations

import time
from dataclasses import dataclass

LASTS = 60.0
"""Seconds after a failure for which it is told, where nothing shows meanwhile that it is over."""


@dataclass(slots=True)
class Trouble:
    """Whether one kind of attention fails, as its own tokens tell from step to step."""

    told: str  # what went wrong last
    _seen: float | None = None  # when it did, seconds, monotonic; None: it works

    @property
    def reason(self) -> str | None:
        """What is wrong; None: nothing that is known of."""
        seen = self._seen
        return None if seen is None or time.monotonic() > seen + LASTS else self.told

    def note(self, *, failed: bool, ran: bool) -> None:
        """Take note of a step: whether some of its tokens fell back, and whether some did not."""
        if failed:
            self._seen = time.monotonic()
        elif ran:
            self._seen = None
