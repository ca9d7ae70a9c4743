"""Server-sent events: chunks, an error in their midst, and the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import StreamingResponse

from service.api.chunks import write
from service.api.errors import error_object, internal_error
from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """An answer of chunks, one event each.

    Args:
        chunks: JSON objects, those that are there sent together; an error among them becomes an
            event, since the status is out.
        close: called when the answer ends, however it ends: a client that leaves before the first
            chunk would otherwise leave a generator that never started, and so never cleans up.
    """

    def __init__(self, chunks: AsyncIterator[list[str]], close: Callable[[], None]) -> None:
        super().__init__(
            _events(chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _events(chunks: AsyncIterator[list[str]]) -> AsyncIterator[bytes]:
    try:
        async for batch in chunks:
            yield "".join([f"data: {chunk}\n\n" for chunk in batch]).encode()
    except ServiceError as error:
        yield _error(error)
    except Exception:  # noqa: BLE001  logged, and told to the client, whose status is out
        yield _error(internal_error())
    yield b"data: [DONE]\n\n"


def _error(error: ServiceError) -> bytes:
    return f"data: {write(error_object(error))}\n\n".encode()
