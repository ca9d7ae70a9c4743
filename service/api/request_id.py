"""An answer's `x-request-id`, by which it is found in the logs of what stands in front."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"


class RequestId:
    """ASGI middleware: an answer has its request's id, or a new one where the request has none.

    Ray Serve does the same around a replica's application: there it would be a second header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        own = dict(scope.get("headers", ())).get(HEADER) or uuid4().hex.encode()

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, own)]
            await send(message)

        await self._app(scope, receive, tagged)
