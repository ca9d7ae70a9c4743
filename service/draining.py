"""The end of a replica that Ray Serve stops: what still runs ends with an error, not a cut."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MARGIN = 2.0
"""Seconds before Serve's limit at which requests are ended, for their last events to go out."""
RETRY = 1.0
"""Seconds until Serve is asked again."""


class Drain:
    """Ends a stopping replica's requests shortly before Serve kills it.

    Serve does not tell a replica that it stops, it only lets running requests finish and checks its
    health no more. So where checks have been missing for almost as long as a stopping replica may
    last, Serve is asked; a controller that does not answer kills nobody, and requests go on.

    Args:
        drain_s: seconds from Serve's decision to its kill.
        stopping: whether Serve, asked now, stops replicas; may block, and may raise.
        end: ends all requests.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        drain_s: float,
        stopping: Callable[[], bool],
        end: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = drain_s - MARGIN
        self._stopping = stopping
        self._end = end
        self._clock = clock
        self._checked = clock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="saccade-drain", daemon=True)

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def checked(self) -> None:
        """Serve has checked the health, so the replica is wanted."""
        self._checked = self._clock()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        wait = self._patience
        while not self._closed.wait(wait):
            wait = self._left()
            if wait > 0:
                continue
            wait = RETRY
            if self._asked() and self._left() <= 0:
                self._end()
                return

    def _left(self) -> float:
        return self._checked + self._patience - self._clock()

    def _asked(self) -> bool:
        try:
            return self._stopping()
        except Exception:  # noqa: BLE001  whatever is wrong with Serve, requests go on
            return False
