"""What operators and clients ask about the service itself: models, health, version, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.errors import error_object
from service.api.state import saccade_version, state_of
from service.errors import EngineDeadError

if TYPE_CHECKING:
    from fastapi import Request

    from service.api.state import State


async def models(request: Request) -> JSONResponse:
    """The one model served here."""
    return JSONResponse({"object": "list", "data": [_model(state_of(request))]})


async def model(request: Request) -> JSONResponse:
    """One model by its name."""
    state = state_of(request)
    state.check_model(request.path_params["name"])
    return JSONResponse(_model(state))


async def health(request: Request) -> JSONResponse:
    """200 while the engine's step loop advances, 503 when it does not."""
    state = state_of(request).engine.health()
    if not state.alive:
        error = EngineDeadError(state.reason or "the engine's step loop does not advance")
        return JSONResponse(error_object(error), error.status)
    return JSONResponse(
        {
            "status": "degraded" if state.degraded else "ok",
            "reason": state.reason,
            "heartbeat_age_seconds": round(state.heartbeat_age, 3),
        }
    )


async def version(_: Request) -> JSONResponse:
    """Saccade's version."""
    return JSONResponse({"version": saccade_version()})


async def metrics(request: Request) -> Response:
    """The series in Prometheus's text format."""
    return Response(state_of(request).engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _model(state: State) -> dict[str, Any]:
    name = state.engine.model_name
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "saccade",
        "root": name,
        "parent": None,
        "max_model_len": state.engine.max_model_len,
    }
