"""What surrounds every request in Ray Serve's HTTP proxies, which outlive the replicas behind them.

A replica that dies can tell its clients nothing. Its proxy knows, and by itself cuts the connection
or answers in plain text; with this it ends an event stream with an error event, and answers what
had not begun in OpenAI's shape. Serve reads the name of `middlewares` from the environment variable
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH of the nodes' processes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.middleware import Middleware

from service.api.errors import error_object, error_response
from service.errors import RequestError, ServiceError, UnavailableError

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
        if answer.plain is not None:
            await _in_json(answer.plain, answer.text)(scope, receive, send)
        elif not answer.begun:
            await error_response(_lost())(scope, receive, send)
        elif not answer.ended and answer.kind.startswith(b"text/event-stream"):
            event = json.dumps(error_object(_lost()), separators=(",", ":"))
            end = f"data: {event}\n\ndata: [DONE]\n\n".encode()
            await send({"type": "http.response.body", "body": end, "more_body": False})
        # A JSON answer that was begun can only be broken off, as it is.


class _Answer:
    """Passes an answer on, but Serve's own errors, and remembers how far it came.

    Attributes:
        begun, ended: whether its status is out, and whether all of it is.
        kind: its content type.
        plain: the first message of an error in plain text, which is kept back; ours are JSON.
        text: of that error.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.ended = False
        self.kind = b""
        self.plain: Message | None = None
        self.text = b""

    async def send(self, message: Message) -> None:
        """Pass a message on, or keep it."""
        if message["type"] == "http.response.start":
            self.kind = dict(message.get("headers", [])).get(b"content-type", b"")
            if message["status"] >= 400 and self.kind.startswith(b"text/plain"):
                self.plain = message
                return
            self.begun = True
        elif message["type"] == "http.response.body":
            if self.plain is not None:
                self.text += message.get("body", b"")
                return
            self.ended = not message.get("more_body", False)
        await self._send(message)


def _in_json(start: Message, text: bytes) -> JSONResponse:
    """An error of Serve's in OpenAI's shape; it may be retried when it was."""
    status = start["status"]
    said = text.decode(errors="replace")
    error: ServiceError = RequestError(said) if status == 404 else UnavailableError(said)
    kept = [(name, value) for name, value in start["headers"] if name == b"retry-after"]
    headers = {name.decode(): value.decode() for name, value in kept}
    return JSONResponse(error_object(error), status, headers)


def _lost() -> UnavailableError:
    return UnavailableError(
        "the replica that computed this answer was lost before its end; send the request again",
        code="replica_lost",
    )
