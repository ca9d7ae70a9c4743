"""The caller's end of a request: deltas from the engine's thread, awaited in an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.engine.types import Delta


class Stream:
    """Asynchronous iterator over one request's deltas; ends when every choice has finished."""

    def __init__(self, choices: int, abort: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._unfinished = choices
        self._abort = abort

    def emit(self, deltas: list[Delta]) -> None:
        """Hand over deltas; called from the engine's thread, one wake-up of the loop a step."""
        try:
            self._loop.call_soon_threadsafe(self._accept, deltas)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._abort()

    def _accept(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._deltas.put_nowait(delta)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._unfinished == 0:
            raise StopAsyncIteration
        delta = await self._deltas.get()
        if delta.finish_reason is not None:
            self._unfinished -= 1
        return delta

    def close(self) -> None:
        """Stop the request if it is still running; safe to call at any time."""
        if self._unfinished:
            self._abort()
            self._unfinished = 0
