"""The Ray Serve deployments: the application and its engine in each replica, without a hop between,
and what answers `/metrics` and `/health` for all of them.

`build`, `build_metrics` and `build_health` are the builders that deploy/serve.yaml names.
"""

# No `from __future__ import annotations` here: Ray reads the builder's annotation as a class.

import os
import warnings
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from service import logs
from service.affinity import ROUTER
from service.api.replica import ReplicaHeader
from service.autoscaling import POLICY
from service.config import ServiceConfig
from service.draining import Drain
from service.encoders.engine import EncoderEngine
from service.engine.engine import Engine
from service.errors import EngineDeadError
from service.metrics_ledger import Ledger, RayStore
from service.metrics_reporter import Reporter
from service.monitor_deployment import Monitor
from service.occupancy import Meter
from service.serving import application
from service.serving import build as build_engine

NAME = "saccade"
"""Of the application and of its deployment."""
ROUTES = {NAME: "/", f"{NAME}-metrics": "/metrics", f"{NAME}-health": "/health"}
"""Applications and their route prefixes; the longest prefix of a path takes the request."""
MONITOR_BYTES = 160 * 2**20
"""Memory that a process for `/metrics` or `/health` has, for Ray to reckon with."""
REPORT_S = 1.0
"""Seconds between two reports of a replica's load to Serve's controller."""


class Replica:
    """One copy of the model with the HTTP application over it; Serve makes and checks it."""

    def __init__(
        self,
        config: ServiceConfig,
        build_engine: Callable[[ServiceConfig], Engine | EncoderEngine] = build_engine,
    ) -> None:
        logs.to_folder()
        self._config = config
        self._engine = build_engine(config)
        self._engine.start()
        name = f"{serve.get_replica_context().replica_id.unique_id}-{uuid4().hex[:8]}"
        engine = self._engine
        self._reporter = Reporter(Ledger(RayStore()), name, engine.metrics, engine.health)
        self._reporter.start()
        self._meter = Meter()
        self._drain = Drain(config.drain_s, _stopping, self._engine.stop)
        self._drain.start()

    def __serve_build_asgi_app__(self) -> object:
        """Called by Serve after the constructor."""
        app = application(self._engine, self._config)
        app.add_middleware(ReplicaHeader, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Called by Serve; a replica that raises is replaced.

        Raises:
            EngineDeadError: the engine's step loop does not advance.
        """
        self._drain.checked()
        health = self._engine.health()
        if not health.alive:
            raise EngineDeadError(health.reason or "the engine's step loop does not advance")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, where it scales: the load by which `service.autoscaling` decides."""
        return self._meter.read(self._engine.load())

    def __del__(self) -> None:
        """Called by Serve when requests have drained."""
        drain = getattr(self, "_drain", None)
        if drain is not None:
            drain.close()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()
        reporter = getattr(self, "_reporter", None)
        if reporter is not None:
            reporter.stop()


def _stopping() -> bool:
    """Whether Serve stops replicas of this deployment at the moment, or all of them."""
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    deployment = application.deployments.get(NAME) if application is not None else None
    if deployment is None:
        return True
    return any(state == "STOPPING" and many for state, many in deployment.replica_states.items())


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
        **_replicas(args),
        ray_actor_options=replica_resources(args),
        # The engine's own queue refuses what is too much, in OpenAI's shape; Serve's limit, which
        # answers in plain text, only has to be out of its way.
        max_ongoing_requests=4 * (args.max_num_seqs + args.max_queue),
        # A checkpoint that cannot be loaded will not load the second time either.
        max_constructor_retry_count=1,
        # Often, because a replica that is not checked any more knows by it that it stops.
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.drain_s,
        max_surge_percent=args.update_surge_percent,
        request_router_config=_router(args),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    application: Application = configured(serve.ingress()(replica)).bind(args)
    return application


def build_metrics(args: ServiceConfig) -> Application:
    """The application that answers `/metrics` for all replicas; its route prefix is that path."""
    return _monitor("/metrics", args)


def build_health(args: ServiceConfig) -> Application:
    """The application that answers `/health` for all replicas; its route prefix is that path."""
    return _monitor("/health", args)


def _monitor(path: str, config: ServiceConfig) -> Application:
    configured = serve.deployment(
        name=path.removeprefix("/"),
        # Where there are several nodes, two of them, so that the loss of one leaves the other.
        num_replicas=1 if config.most_replicas == 1 else 2,
        ray_actor_options={"num_cpus": 0, "memory": MONITOR_BYTES},
        max_ongoing_requests=100,
        health_check_period_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=2,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    application: Application = configured(serve.ingress()(Monitor)).bind(
        path, NAME, config.api_key, metrics_need_key=config.metrics_need_key
    )
    return application


def _replicas(config: ServiceConfig) -> dict[str, Any]:
    """Serve's options: a fixed number, or a range and the policy that chooses from it."""
    scaling = config.autoscaling
    if scaling.max_replicas is None:
        return {"num_replicas": config.replicas}
    limits = scaling.model_dump(exclude={"min_replicas", "max_replicas"})
    with warnings.catch_warnings():
        # Serve deprecates the interval for a variable that it does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        options = AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            metrics_interval_s=REPORT_S,
            look_back_period_s=5 * REPORT_S,
            # The policy itself waits: Serve's delays would come on top.
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy={"policy_function": POLICY, "policy_kwargs": limits},  # type: ignore[arg-type]
        )
    return {"autoscaling_config": options}


def _router(config: ServiceConfig) -> RequestRouterConfig:
    """Sessions keep to a replica, where Serve's own proxies route and not HAProxy."""
    # Serve refuses a router that HAProxy would leave out.
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        return RequestRouterConfig()
    return RequestRouterConfig(
        request_router_class=ROUTER,  # type: ignore[arg-type]
        request_router_kwargs={"limit": config.affinity_limit or config.max_num_seqs},
    )


def replica_resources(config: ServiceConfig) -> dict[str, Any]:
    """A GPU a replica, or an equal share of the cores."""
    if config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available()):
        return {"num_cpus": 1, "num_gpus": 1}
    # Ray sets the number of torch's threads to it.
    return {"num_cpus": max(1, len(os.sched_getaffinity(0)) // config.most_replicas)}
