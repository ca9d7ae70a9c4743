"""What every handler of the application shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol, cast

from service.api.desk import Desk
from service.api.schemas import Bounds
from service.errors import UnknownModelError

if TYPE_CHECKING:
    from fastapi import Request

    from models.tokenizer import Tokenizer
    from service.config import ServiceConfig
    from service.encoders.engine import EncoderEngine
    from service.engine.engine import Engine
    from service.engine.types import Health
    from service.metrics import Metrics


class Shape(Protocol):
    """What every model's configuration says."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""


class Served(Protocol):
    """What the engines of decoders and of encoders have in common."""

    model_name: str
    max_model_len: int
    tokenizer: Tokenizer
    metrics: Metrics

    @property
    def config(self) -> Shape:
        """The model's configuration."""

    def health(self) -> Health:
        """Whether the engine's thread advances."""


@dataclass(frozen=True, slots=True)
class State:
    """The engine, the configuration, what follows from both, and a thread for small work."""

    engine: Served
    config: ServiceConfig
    desk: Desk = field(default_factory=Desk)
    started: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    @property
    def decoder(self) -> Engine:
        """The engine, for the routes of `service.api.app`."""
        return cast("Engine", self.engine)

    @property
    def encoder(self) -> EncoderEngine:
        """The engine, for the routes of `service.encoders.app`."""
        return cast("EncoderEngine", self.engine)

    @property
    def bounds(self) -> Bounds:
        """What request validation needs to know."""
        return Bounds(self.config.limits, self.engine.config.vocab_size)

    @property
    def max_bytes(self) -> int:
        """Largest request body."""
        return int(self.config.max_body_mib * 2**20)

    def check_model(self, name: str | None) -> None:
        """Refuse models that are not served here.

        Raises:
            UnknownModelError: `name` is given and is not the served model's.
        """
        if name is not None and name != self.engine.model_name:
            raise UnknownModelError(
                f"the model {name[:100]!r} is not served here; use {self.engine.model_name!r}",
                param="model",
                code="model_not_found",
            )


def state_of(request: Request) -> State:
    """The application's state."""
    state = request.app.state.saccade
    assert isinstance(state, State)
    return state


@cache
def saccade_version() -> str:
    """The installed version, or "unknown" when the sources run without an installation."""
    try:
        return version("saccade")
    except PackageNotFoundError:
        return "unknown"
