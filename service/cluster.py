"""A Ray cluster of this process's own, on this machine, for `saccade serve`."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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

PATIENCE = 5.0
"""Seconds that Ray's processes have to end by themselves."""

_OUR_ERROR = re.compile(r"^(?:kernels|models|service)\.errors\.\w+: (.+)$", re.MULTILINE)
"""The last line of a remote traceback that ends in an error of ours."""


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
    os.environ.update({"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"})
    if haproxy is not None:
        os.environ.update(environment(haproxy, config, folder / "haproxy"))

    import ray
    from ray import serve

    from service.deployment import NAME
    from service.deployment import build as build_ours

    keep_logs = False
    # Ray's processes die with the thread that started them, not with the process: it stays.
    starter = ThreadPoolExecutor(1)
    try:
        try:
            _init(starter, folder, max(len(os.sched_getaffinity(0)), config.replicas))
            _check_gpus(config)
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": LOOPBACK if haproxy else config.host, "port": config.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run((build or build_ours)(config), name=NAME, route_prefix="/")
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  Ray raises bare ones when it starts too slowly
            reason = _replica_error(NAME) if ray.is_initialized() else None
            keep_logs = reason is None
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                reason or f"Ray Serve did not start ({line}); its logs are in {folder}"
            ) from None
        try:
            yield
        finally:
            # Waits for running requests, up to the deployment's limit.
            serve.delete(NAME)
    finally:
        started = descendants()
        ray.shutdown()
        # Where it was interrupted while starting, Ray leaves some behind.
        end(started, PATIENCE)
        starter.shutdown()
        # A later cluster of this process looks for HAProxy itself again.
        os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
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


def _check_gpus(config: ServiceConfig) -> None:
    """Refuse replicas that would wait for ever for GPUs that are not there."""
    import ray

    from service.deployment import replica_resources

    need = config.replicas * replica_resources(config).get("num_gpus", 0)
    have = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if need > have:
        raise ConfigError(
            f"invalid configuration: {config.replicas} replicas need {need:g} GPUs and this "
            f"machine has {have:g}; lower replicas or choose --device cpu"
        )


def _replica_error(name: str) -> str | None:
    """What one of our errors said in a replica's constructor, if one ended it."""
    from ray import serve

    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application else ():
        if found := _OUR_ERROR.findall(deployment.message):
            return str(found[-1]).strip()
    return None
