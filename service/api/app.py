"""The HTTP application: OpenAI's API over an engine, without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from starlette.routing import Route

from service.api.application import COMMON, MODELS, application
from service.api.chat import chat_completions
from service.api.completions import completions
from service.api.explorer import explorer
from service.api.pattern_auto import pattern_auto
from service.api.patterns import look, patterns
from service.api.sample import sample
from service.api.state import state_of
from service.errors import NotOfferedError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from service.config import ServiceConfig
    from service.engine.engine import Engine


ENCODER_PATHS = ("/v1/embeddings", "/classify", "/fill-mask", "/question-answering")
"""What `service.encoders.app` offers and a decoder does not."""


def create_app(engine: Engine, config: ServiceConfig) -> FastAPI:
    """The application over a started engine; see `service.api.application`."""
    return application(
        engine,
        config,
        [
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            *(Route(path, encodes_nothing, methods=["POST"]) for path in ENCODER_PATHS),
            *MODELS,
            Route("/v1/patterns", patterns, methods=["GET"]),
            Route("/v1/patterns", look, methods=["POST"]),
            Route("/v1/patterns/auto", pattern_auto),
            Route("/v1/sample", sample),
            Route("/explorer", explorer),
            Route("/explorer/{name}", explorer),
            *COMMON,
        ],
    )


async def encodes_nothing(request: Request) -> NoReturn:
    """A decoder has no such head.

    Raises:
        NotOfferedError: always.
    """
    raise NotOfferedError(
        f"{request.url.path} is not offered: {state_of(request).engine.model_name} is a decoder, "
        "which generates text; use /v1/completions or /v1/chat/completions, or serve a Longformer "
        "or BigBird checkpoint"
    )
