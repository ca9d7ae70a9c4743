"""What serves a checkpoint: the engine and the application of a decoder, or of an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.encoders.config import EncoderConfig
from service.api.app import create_app
from service.encoders.app import create_encoder_app
from service.encoders.build import build_encoder, check_encoder
from service.encoders.engine import EncoderEngine
from service.engine.build import build_engine, check_config

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.config import ServiceConfig
    from service.engine.engine import Engine


def is_encoder(config: ServiceConfig) -> bool:
    """Whether the checkpoint is an encoder's.

    Raises:
        CheckpointError: config.json is missing or damaged.
    """
    return EncoderConfig.is_encoder(config.model)


def check(config: ServiceConfig) -> None:
    """Everything that can be known to be wrong before the weights are read.

    Raises:
        ConfigError: the numbers contradict each other.
        ModelError: the checkpoint's config.json cannot be served.
    """
    (check_encoder if is_encoder(config) else check_config)(config)


def build(config: ServiceConfig) -> Engine | EncoderEngine:
    """The engine of a checkpoint; the caller starts and stops it.

    Raises:
        ConfigError: the numbers contradict each other.
        ModelError: the checkpoint cannot be loaded.
    """
    return build_encoder(config) if is_encoder(config) else build_engine(config)


def application(engine: Engine | EncoderEngine, config: ServiceConfig) -> FastAPI:
    """The application over a started engine."""
    if isinstance(engine, EncoderEngine):
        return create_encoder_app(engine, config)
    return create_app(engine, config)
