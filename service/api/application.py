"""What the applications over a decoder and over an encoder have alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.routing import Route

from service.api.errors import add_handlers
from service.api.guard import Guard
from service.api.state import State, saccade_version
from service.api.status import health, metrics, model, models, version
from service.api.tokens import detokenize, tokenize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.api.state import Served
    from service.config import ServiceConfig

MODELS = (Route("/v1/models", models), Route("/v1/models/{name:path}", model))
COMMON = (
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health),
    Route("/version", version),
    Route("/metrics", metrics),
)


def application(engine: Served, config: ServiceConfig, routes: Sequence[Route]) -> FastAPI:
    """The application of some routes over a started engine.

    The caller starts and stops the engine; any ASGI server can run the application.
    """
    app = FastAPI(
        title="Saccade",
        version=saccade_version(),
        # Plain routes: the handlers read bodies themselves, with bounds on size and on errors.
        routes=list(routes),
        openapi_url=None,
    )
    app.state.saccade = State(engine, config)
    add_handlers(app)
    app.add_middleware(Guard, config=config)
    return app
