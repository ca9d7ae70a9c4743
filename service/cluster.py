"""A Ray cluster of this process's own, on this machine, for `saccade serve`."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service import logs
from service.errors import ConfigError
from service.haproxy import LOOPBACK, chosen, environment
from service.processes import descendants, end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor

    from ray.serve import Application

    from service.config import ServiceConfig

OBJECT_STORE_BYTES = 200 * 2**20
"""Shared memory for request bodies on their way to a replica; Ray's default is 30% of all."""

PROXY_MIDDLEWARES = "service.proxy:middlewares"
"""What Serve's proxies import; they tell a client that its replica is lost."""

PATIENCE = 5.0
"""Seconds that Ray's processes have to end by themselves."""


@contextmanager
def local_cluster(
    config: ServiceConfig, build: Callable[[ServiceConfig], Application] | None = None
) -> Iterator[None]:
    """Run an application, ours by default, on a private Ray cluster; all of it ends with the block.

    Private: random ports and names, a token and a folder of its own, and no look at an existing
    cluster's address, so that several run on one machine and none joins another.

    Raises:
        ConfigError: the application did not start; the message has the reason.
    """
    config.check_ray_device()
    haproxy = chosen(config)
    # Short, because sockets lie in it and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="saccade-", dir="/tmp"))
    # Before Ray's import, which reads some of them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray would otherwise write a token into the user's home.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Of Serve's proxies, which are Ray's processes and not ours.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", PROXY_MIDDLEWARES)
    os.environ.update({"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"})
    if haproxy is not None:
        os.environ.update(environment(haproxy, config, folder / "haproxy"))
    written = folder / "log"
    written.mkdir()
    os.environ[logs.FOLDER] = str(written)

    import ray
    from ray import serve

    from service.deployment import NAME, ROUTES, build_health, build_metrics
    from service.deployment import build as build_ours
    from service.serve_state import replica_error

    keep_logs = False
    # Ray's processes die with the thread that started them, not with the process: it stays.
    starter = ThreadPoolExecutor(1)
    try:
        try:
            _init(starter, folder, max(len(os.sched_getaffinity(0)), config.most_replicas))
            _check_gpus(config)
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": LOOPBACK if haproxy else config.host, "port": config.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            built = ((build or build_ours)(config), build_metrics(config), build_health(config))
            serve.run_many(
                [
                    serve.RunTarget(application, name=name, route_prefix=route)
                    for application, (name, route) in zip(built, ROUTES.items(), strict=True)
                ]
            )
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  Ray raises bare ones when it starts too slowly
            reason = replica_error(NAME) if ray.is_initialized() else None
            keep_logs = reason is None
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                reason or f"Ray Serve did not start ({line}); its logs are in {folder}"
            ) from None
        with logs.shown(written):
            try:
                yield
            finally:
                _drain(NAME, config.drain_s)
    finally:
        started = descendants()
        ray.shutdown()
        # Where it was interrupted while starting, Ray leaves some behind.
        end(started, PATIENCE)
        starter.shutdown()
        # A later cluster of this process looks for HAProxy itself again.
        os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
        os.environ.pop(logs.FOLDER, None)
        if not keep_logs:
            shutil.rmtree(folder, ignore_errors=True)


def _init(starter: Executor, folder: Path, cores: int) -> None:
    import ray

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # In another thread, because in this one Ray would take the signals over. One that arrives
    # meanwhile waits for the end of it, so that what has been started is known and can be ended.
    starting = starter.submit(
        ray.init,
        address="local",
        namespace=f"saccade-{uuid.uuid4().hex}",
        num_cpus=cores,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        _temp_dir=str(folder),
    )
    try:
        starting.result()
    finally:
        wait([starting])
        # Ray's native code has installed a handler of its own, which aborts; Python still knows
        # which one it was to be.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _drain(name: str, seconds: float) -> None:
    """Take an application away once its requests have ended, or `seconds` have passed."""
    from ray import serve

    # Serve's own waiting gives up after a minute.
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + seconds + PATIENCE
    while name in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)


def _check_gpus(config: ServiceConfig) -> None:
    """Refuse replicas that would wait for ever for GPUs that are not there."""
    import ray

    from service.deployment import replica_resources

    need = config.most_replicas * replica_resources(config).get("num_gpus", 0)
    have = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if need > have:
        raise ConfigError(
            f"invalid configuration: {config.most_replicas} replicas need {need:g} GPUs and this "
            f"machine has {have:g}; ask for fewer or choose --device cpu"
        )
