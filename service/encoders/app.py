"""The HTTP application over an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from starlette.routing import Route

from service.api.application import COMMON, MODELS, application
from service.api.state import state_of
from service.encoders.answers import offered
from service.encoders.routes import classified, embeddings, fill_mask, question_answering
from service.errors import NotOfferedError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from service.config import ServiceConfig
    from service.encoders.engine import EncoderEngine


def create_encoder_app(engine: EncoderEngine, config: ServiceConfig) -> FastAPI:
    """The application over a started engine; see `service.api.application`."""
    return application(
        engine,
        config,
        [
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/classify", classified, methods=["POST"]),
            Route("/fill-mask", fill_mask, methods=["POST"]),
            Route("/question-answering", question_answering, methods=["POST"]),
            Route("/v1/completions", generates_nothing, methods=["POST"]),
            Route("/v1/chat/completions", generates_nothing, methods=["POST"]),
            *MODELS,
            *COMMON,
        ],
    )


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
