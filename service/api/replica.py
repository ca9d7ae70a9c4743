"""Names the replica that answers, to see where a router sends requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-saccade-replica"


class ReplicaHeader:
    """ASGI middleware that adds the header `x-saccade-replica` to every response."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._header = (HEADER.encode(), name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self._app(scope, receive, named)
