"""`saccade serve`: an OpenAI-compatible service over one model."""

from __future__ import annotations

import asyncio
import errno
import json
import shlex
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service import logs
from service.api.request_id import RequestId
from service.commands.options import as_fields, with_config_options
from service.config import BUNDLED_CHECKPOINT, load_config
from service.draining import MARGIN
from service.engine.build import device_name
from service.errors import ConfigError
from service.serving import application, build, check, is_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.config import ServiceConfig


@with_config_options
def serve(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; the bundled one by default.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file; SACCADE_* variables and flags win.")
    ] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="One process with uvicorn instead of Ray Serve.")
    ] = False,
    **flags: Any,
) -> None:
    """Serve a model over OpenAI's HTTP API until Ctrl-C."""
    given = as_fields(flags)
    if model is not None:
        given["model"] = model
    settings = load_config(given, config)
    if standalone and (settings.autoscaling.max_replicas or settings.replicas) > 1:
        raise ConfigError(
            "invalid configuration: --standalone serves one copy of the model; set replicas to 1 "
            "and remove autoscaling.max_replicas, or serve without --standalone"
        )
    check(settings)
    with _stopping_on_signals(), _claim(settings), _free_port(settings) as listener:
        logs.to_stderr()
        if standalone:
            _serve_standalone(settings, listener)
        else:
            listener.close()
            _serve_with_ray(settings)


def _serve_with_ray(config: ServiceConfig) -> None:
    from service.cluster import local_cluster

    _say(f"Starting Ray Serve with {config.model_name} ...")
    with local_cluster(config):
        _say(_greeting(config))
        threading.Event().wait()


def _serve_standalone(config: ServiceConfig, listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            _say(_greeting(config))

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Streams that are still open then end with an error event, not with a cut connection.
            loop = asyncio.get_running_loop()
            timer = loop.call_later(
                config.drain_s - MARGIN, loop.run_in_executor, None, engine.stop
            )
            await super().shutdown(sockets)
            timer.cancel()

    engine = build(config)
    engine.start()
    try:
        settings = uvicorn.Config(
            RequestId(application(engine, config)),
            log_level="warning",
            timeout_graceful_shutdown=config.drain_s,
        )
        Server(settings).run(sockets=[listener])
    finally:
        engine.stop()


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Leave the block on the first SIGINT or SIGTERM; later ones cannot disturb the cleaning up."""

    def stop(*_: object) -> NoReturn:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _say("Stopping ...")
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        _say("Stopped.")


@contextmanager
def _claim(config: ServiceConfig) -> Iterator[None]:
    """Hold the address from before loading to the end, so that two starts cannot both take it.

    Ray binds late and shares ports: it would let a second service in. The claim is a name in
    Linux's abstract socket namespace, which goes when the process does.

    Raises:
        ConfigError: another `saccade serve` has the address.
    """
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0saccade-serve-{config.host}-{config.port}")
        except OSError:
            raise _in_use(config) from None
        yield


def _in_use(config: ServiceConfig) -> ConfigError:
    return ConfigError(
        f"port {config.port} of {config.host} is in use; stop what uses it or choose another with "
        "--port"
    )


@contextmanager
def _free_port(config: ServiceConfig) -> Iterator[socket.socket]:
    """A socket bound to the configured address, to know before loading that it can be had.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    where = f"port {config.port} of {config.host}"
    try:
        family, kind, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from None
    with listener:
        # A port whose last connections linger in TIME_WAIT is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # Bound alone would not conflict with a listener that allows sharing.
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(config) from None
            raise ConfigError(f"cannot listen on {where}: {error.strerror}") from None
        yield listener


def _greeting(config: ServiceConfig) -> str:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_key is not None else ""
    if is_encoder(config):
        body = shlex.quote(json.dumps({"model": config.model_name, "input": "The old man"}))
        return f"""
Saccade serves {config.model_name} at {url} (Ctrl-C stops it). Try:

  curl {url}/v1/embeddings{key} \\
    -H 'Content-Type: application/json' -d {body}
"""
    path, body, about = _example(config)
    dense_below = config.sparsity.dense_below_on(device_name(config.device))
    return f"""
Saccade serves {config.model_name} at {url} (Ctrl-C stops it). Try:

  curl {url}{path}{key} \\
    -H 'Content-Type: application/json' -d {body}

{about}The answer is OpenAI's, plus `sparsity`, which says where the attention looked:
  policy         dynamic: each step chose its keys; fixed: a pattern did; dense: it read them all
  density        keys read over keys that could be read; 1 is everything
  coverage       share of the attention mass on the keys read (estimated); coverage_p5: the 5th
                 percentile over layers and heads
  keys_attended  keys read a token, mean over layers and KV heads
  fallbacks      tokens that did not follow dynamic, by reason; short_context: fewer than
                 {dense_below} tokens, or too few of a prompt: reading them all is the faster

In a browser: {url}/explorer
"""


def _example(config: ServiceConfig) -> tuple[str, str, str]:
    """A request to try: its path, curl's argument for its body, and what it asks."""
    file = BUNDLED_CHECKPOINT / "example_request.json"
    example = json.loads(file.read_text(encoding="utf-8"))
    if config.model.resolve() == BUNDLED_CHECKPOINT and config.model_name == example["model"]:
        about = (
            "It asks for a number that one sentence of a long document states: "
            f"{example['metadata']['answer']}.\n"
        )
        return "/v1/chat/completions", f"@{shlex.quote(str(file))}", about
    request = {"model": config.model_name, "prompt": "The old man went to", "max_tokens": 24}
    return "/v1/completions", shlex.quote(json.dumps(request)), ""


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
