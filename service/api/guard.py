"""What surrounds every request: the API key, and the last line of defence."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Protocol

from starlette.requests import ClientDisconnect

from service.api.errors import error_response, internal_error
from service.errors import AuthError

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Keys(Protocol):
    """What a configuration says of keys."""

    @property
    def api_key(self) -> SecretStr | None:
        """Clients must send it, if there is one."""

    @property
    def metrics_need_key(self) -> bool:
        """Whether `/metrics` asks for it, too."""


class Guard:
    """ASGI middleware; checks the key on every path that is not explicitly open."""

    def __init__(self, app: ASGIApp, config: Keys) -> None:
        self._app = app
        self._key = None if config.api_key is None else config.api_key.get_secret_value().encode()
        # The explorer's page holds no secret, and asks for the key itself.
        self._open = {"/health", "/explorer"} | (set() if config.metrics_need_key else {"/metrics"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        if not self._allowed(scope):
            refusal = error_response(
                AuthError(
                    "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
            )
            await refusal(scope, receive, send)
            return
        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            return
        except Exception:
            answer = error_response(internal_error())
            if started:
                raise  # half an answer is out: breaking the connection is all that can tell
            await answer(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path = scope["path"]
        if self._key is None or path in self._open or path.startswith("/explorer/"):
            return True
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key)
