"""The Ray Serve deployment: the application and its engine in each replica, without a hop between.

`build` is the application builder that deploy/serve.yaml names.
"""

# No `from __future__ import annotations` here: Ray reads the builder's annotation as a class.

import os
from collections.abc import Callable
from typing import Any

import torch
from ray import serve
from ray.serve import Application

from service.config import ServiceConfig
from service.encoders.engine import EncoderEngine
from service.engine.engine import Engine
from service.errors import EngineDeadError
from service.serving import application
from service.serving import build as build_engine

NAME = "saccade"
"""Of the application and of its deployment."""


class Replica:
    """One copy of the model with the HTTP application over it; Serve makes and checks it."""

    def __init__(
        self,
        config: ServiceConfig,
        build_engine: Callable[[ServiceConfig], Engine | EncoderEngine] = build_engine,
    ) -> None:
        self._config = config
        self._engine = build_engine(config)
        self._engine.start()

    def __serve_build_asgi_app__(self) -> object:
        """Called by Serve after the constructor."""
        return application(self._engine, self._config)

    def check_health(self) -> None:
        """Called by Serve; a replica that raises is replaced.

        Raises:
            EngineDeadError: the engine's step loop does not advance.
        """
        health = self._engine.health()
        if not health.alive:
            raise EngineDeadError(health.reason or "the engine's step loop does not advance")

    def __del__(self) -> None:
        """Called by Serve when requests have drained, or their time is up."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


def build(args: ServiceConfig) -> Application:
    """The Ray Serve application for a configuration.

    Raises:
        ConfigError: it names one of several GPUs, which is Ray's to choose.
    """
    return deployed(args, Replica)


def deployed(args: ServiceConfig, replica: type[Replica]) -> Application:
    """The application whose replicas are of the class `replica`.

    Raises:
        ConfigError: it names one of several GPUs, which is Ray's to choose.
    """
    args.check_ray_device()
    configured = serve.deployment(
        name=NAME,
        num_replicas=args.replicas,
        ray_actor_options=replica_resources(args),
        # The engine's own queue refuses what is too much, in OpenAI's shape; Serve's limit, which
        # answers in plain text, only has to be out of its way.
        max_ongoing_requests=4 * (args.max_num_seqs + args.max_queue),
        # A checkpoint that cannot be loaded will not load the second time either.
        max_constructor_retry_count=1,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    application: Application = configured(serve.ingress()(replica)).bind(args)
    return application


def replica_resources(config: ServiceConfig) -> dict[str, Any]:
    """A GPU a replica, or an equal share of the cores."""
    if config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available()):
        return {"num_cpus": 1, "num_gpus": 1}
    # Ray sets the number of torch's threads to it.
    return {"num_cpus": max(1, len(os.sched_getaffinity(0)) // config.replicas)}
