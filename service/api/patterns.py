"""GET and POST /v1/patterns: what patterns are made of, and one looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from kernels.errors import PatternError
from service.api import body
from service.api.pattern_schemas import ViewRequest
from service.api.pattern_view import catalogue, view
from service.api.state import state_of
from service.errors import RequestError

if TYPE_CHECKING:
    from fastapi import Request

MAX_BYTES = 1 << 16
"""Of a body."""


async def patterns(request: Request) -> JSONResponse:
    """Primitives, operators, presets and tasks."""
    return JSONResponse(await state_of(request).desk.run(catalogue))


async def look(request: Request) -> JSONResponse:
    """A part of a pattern's mask, and its figures."""
    state = state_of(request)
    asked = await body.read(request, ViewRequest, state.bounds, MAX_BYTES)
    return JSONResponse(await state.desk.run(lambda: _view(asked)))


def _view(asked: ViewRequest) -> dict[str, Any]:
    try:
        return view(asked)
    except PatternError as error:
        raise RequestError(
            str(error), param="spec", code="invalid_pattern", position=error.position
        ) from None
