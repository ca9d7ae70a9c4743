"""The HTTP application over an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from fastapi import FastAPI
from starlette.routing import Route

from service.api.errors import add_handlers
from service.api.guard import Guard
from service.api.state import State, saccade_version, state_of
from service.api.status import health, metrics, model, models, version
from service.api.tokens import detokenize, tokenize
from service.encoders.answers import offered
from service.encoders.routes import classified, embeddings, fill_mask, question_answering
from service.errors import NotOfferedError

if TYPE_CHECKING:
    from fastapi import Request

    from service.config import ServiceConfig
    from service.encoders.engine import EncoderEngine


def create_encoder_app(engine: EncoderEngine, config: ServiceConfig) -> FastAPI:
    """The application over a started engine; the caller starts and stops it."""
    app = FastAPI(
        title="Saccade",
        version=saccade_version(),
        routes=[
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/classify", classified, methods=["POST"]),
            Route("/fill-mask", fill_mask, methods=["POST"]),
            Route("/question-answering", question_answering, methods=["POST"]),
            Route("/v1/completions", generates_nothing, methods=["POST"]),
            Route("/v1/chat/completions", generates_nothing, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health", health),
            Route("/version", version),
            Route("/metrics", metrics),
        ],
        openapi_url=None,
    )
    app.state.saccade = State(engine, config)
    add_handlers(app)
    app.add_middleware(Guard, config=config)
    return app


async def generates_nothing(request: Request) -> NoReturn:
    """An encoder has no next token.

    Raises:
        NotOfferedError: always.
    """
    engine = state_of(request).encoder
    raise NotOfferedError(
        f"{request.url.path} is not offered: {engine.model_name} is a "
        f"{engine.config.architecture}, which generates no text; use {offered(engine)}"
    )
