"""A thread of its own for work that computes for a moment, so that nothing else waits for it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from service.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

QUEUE = 16
"""Pieces of work that may wait."""


class Desk:
    """Runs one piece of work at a time; the event loop and its threads stay free meanwhile."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saccade-desk")
        self._open = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises.

        Raises:
            OverloadedError: too much is waiting.
        """
        if self._open > QUEUE:
            raise OverloadedError("too many patterns are being looked at: try again later")
        self._open += 1
        running = self._thread.submit(work)
        # Counted until it is done, also where the client has gone: the thread does not stop.
        loop = asyncio.get_running_loop()
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._close))
        return await asyncio.wrap_future(running)

    def _close(self) -> None:
        self._open -= 1
