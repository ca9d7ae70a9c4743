"""The caller's end of a request: deltas from the engine's thread, awaited in an event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from service.engine.types import Delta


class Stream:
    """Asynchronous iterator over one request's deltas; ends when every choice has finished."""

    def __init__(self, choices: int, abort: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._arrived: deque[Delta] = deque()
        self._waiting: asyncio.Future[None] | None = None  # a reader
        self._unfinished = choices
        self._abort = abort

    def accept(self, deltas: list[Delta]) -> None:
        """Take deltas in; called in the stream's event loop."""
        self._arrived += deltas
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._unfinished == 0:
            raise StopAsyncIteration
        while not self._arrived:
            self._waiting = self.loop.create_future()
            await self._waiting
        return self._next()

    def more(self) -> list[Delta]:
        """Deltas that have arrived besides: where the reader is late, there are some."""
        return [self._next() for _ in range(len(self._arrived)) if self._unfinished]

    def close(self) -> None:
        """Stop the request if it is still running; safe to call at any time."""
        if self._unfinished:
            self._abort()
            self._unfinished = 0

    def _next(self) -> Delta:
        delta = self._arrived.popleft()
        if delta.finish_reason is not None:
            self._unfinished -= 1
        return delta


def deliver(parcels: Iterable[tuple[Stream, list[Delta]]]) -> None:
    """Hand a step's deltas to their streams; called from the engine's thread.

    Each event loop is woken once, not once for each of its streams.
    """
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[Stream, list[Delta]]]]
    by_loop = defaultdict(list)
    for stream, deltas in parcels:
        by_loop[stream.loop].append((stream, deltas))
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_accept, batch)
        except RuntimeError:  # the loop is closed: nobody listens any more
            for stream, _ in batch:
                stream.close()


def _accept(batch: list[tuple[Stream, list[Delta]]]) -> None:
    for stream, deltas in batch:
        stream.accept(deltas)
