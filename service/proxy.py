"""What surrounds every request in Ray Serve's HTTP proxies, which outlive the replicas behind them.

A replica that dies can tell its clients nothing. Its proxy knows, and by itself cuts the connection
or answers in plain text; with this it ends an event stream with an error event, and answers what
had not begun in OpenAI's shape. Serve reads the name of `middlewares` from the environment variable
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH of the nodes' processes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.middleware import Middleware

from service.api.errors import error_object, error_response
from service.errors import UnavailableError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(LastWords)]


class LastWords:
    """ASGI middleware: ends what the application behind it leaves unended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if not answer.begun:
            await error_response(_lost())(scope, receive, send)
        elif not answer.ended and answer.is_events:
            event = json.dumps(error_object(_lost()), separators=(",", ":"))
            end = f"data: {event}\n\ndata: [DONE]\n\n".encode()
            await send({"type": "http.response.body", "body": end, "more_body": False})
        # A JSON answer that is cut short can only be broken off, as it is.


class _Answer:
    """Passes an answer on and remembers how far it came."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.ended = self.is_events = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.begun = True
            kind = dict(message.get("headers", [])).get(b"content-type", b"")
            self.is_events = kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)


def _lost() -> UnavailableError:
    return UnavailableError(
        "the replica that computed this answer was lost before its end; send the request again",
        code="replica_lost",
    )
