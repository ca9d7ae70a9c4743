"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import RequestError, ServiceError, UnavailableError
from service.wording import sentence

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from pydantic import ValidationError

    from kernels.errors import PatternError

MAX_MESSAGE = 600
"""Characters of a message: enough for a sentence, too few to send a body back."""
MAX_NAME = 64
"""Characters of a field name that the client chose."""

_log = logging.getLogger("saccade.api")


def error_object(error: ServiceError) -> dict[str, Any]:
    """The body of an error's answer, also sent inside an event stream."""
    told: dict[str, Any] = {
        "message": shorten(error.message, MAX_MESSAGE),
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, RequestError) and error.position is not None:
        told["position"] = error.position
    return {"error": told}


def error_response(error: ServiceError) -> JSONResponse:
    """An error as an HTTP answer."""
    headers = {}
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_object(error), error.status, headers)


def internal_error() -> ServiceError:
    """The answer to an error that nobody foresaw; call it where that error is being handled.

    The log has the traceback; the client gets a number to ask about, since messages of foreign
    errors may hold paths or parts of other requests.
    """
    number = uuid4().hex[:12]
    _log.exception("internal error %s", number)
    return ServiceError(f"internal error {number}; the service's log has the details")


class InvalidPatternError(ValueError):
    """A field's pattern does not parse: what a validator raises, with the character's place."""

    def __init__(self, error: PatternError) -> None:
        super().__init__(str(error))
        self.position = error.position


def from_validation(error: ValidationError) -> RequestError:
    """A request that does not fit its schema; the message names up to three fields."""
    found = error.errors(include_url=False, include_input=False)
    sentences, params = [], []
    for entry in found[:3]:
        path = [shorten(str(part), MAX_NAME) for part in entry["loc"]]
        message = sentence(entry)
        # A check across fields has no place of its own: it starts with the field's name.
        if not path and ": " in message:
            name, message = message.split(": ", 1)
            path = [name]
        param = ".".join(path)
        sentences.append(f"{param}: {message}" if param else message)
        params.append(param)
    cause = found[0].get("ctx", {}).get("error")
    if isinstance(cause, InvalidPatternError):
        return RequestError(
            "; ".join(sentences),
            param=params[0],
            code="invalid_pattern",
            position=cause.position,
        )
    return RequestError("; ".join(sentences), param=params[0] or None)


def add_handlers(app: FastAPI) -> None:
    """Make `app` answer every error in OpenAI's shape."""

    @app.exception_handler(ServiceError)
    async def _service_error(_: Request, error: ServiceError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = shorten(request.url.path, MAX_NAME)
        # Starlette has them in no order.
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = {
            404: f"there is nothing at {path}; the routes are listed in docs/server.md",
            405: f"{path} takes no {shorten(request.method, MAX_NAME)} requests; use {allowed}",
        }.get(error.status_code, shorten(str(error.detail), MAX_MESSAGE))
        return JSONResponse(error_object(RequestError(message)), error.status_code, error.headers)


def shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
