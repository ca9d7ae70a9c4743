"""A service whose engine computes nothing: every stream gets one token each tick.

    python tests/bench/ticking.py standalone|ray PORT

What is left of a token's cost is the service's own: from the engine's thread to the socket.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.generation import GenerationDefaults  # noqa: E402  (the script also runs uninstalled)
from service.config import ServiceConfig  # noqa: E402
from service.engine.stream import Stream, deliver  # noqa: E402
from service.engine.types import Delta, Health  # noqa: E402
from service.metrics import Metrics  # noqa: E402

if TYPE_CHECKING:
    from ray.serve import Application

TICK = 0.02
"""Seconds a token."""
WORD = " word"


class Words:
    """As much of a tokenizer as an endpoint asks for: a word a token."""

    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """One id a word."""
        return [1] * len(text.split())


@dataclass(slots=True)
class _Running:
    stream: Stream
    left: int  # tokens


class TickingEngine:
    """The engine's interface over a clock."""

    model_name = "ticking"
    max_model_len = 2**20
    tokenizer = Words()
    config = SimpleNamespace(vocab_size=256, generation=GenerationDefaults())

    def __init__(self) -> None:
        self.metrics = Metrics(self.model_name)
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="saccade-engine", daemon=True)

    def start(self) -> None:
        """Begin to tick."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def check_room(self, choices: int) -> None:
        """There always is."""

    def health(self) -> Health:
        """Whether it ticks."""
        return Health(self._thread.is_alive(), 0.0)

    def submit(self, prompt, sampling, sparsity, *, n, priority, request_id, cache_salt) -> Stream:
        """A stream of `max_tokens` tokens, the first at the next tick."""
        stream = Stream(n, lambda: self.abort(request_id))
        with self._lock:
            self._running[request_id] = _Running(stream, sampling.max_tokens)
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a stream."""
        with self._lock:
            self._running.pop(request_id, None)

    def _loop(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            # A machine that falls behind does not catch up in a burst, as a model would not.
            due = max(due + TICK, time.monotonic())
            with self._lock:
                self.metrics.set_load(len(self._running), 0, 0.0)
                for one in self._running.values():
                    one.left -= 1
                deliver(
                    (one.stream, [Delta(0, WORD, (1,), (), None if one.left else "length")])
                    for one in self._running.values()
                )
                self._running = {name: one for name, one in self._running.items() if one.left}


def settings(port: int) -> ServiceConfig:
    """Of the service; the model that it names is not read."""
    return ServiceConfig(port=port, device="cpu")


def application(config: ServiceConfig) -> Application:
    """The Ray Serve application over a ticking engine."""
    from service.deployment import Replica, deployed

    class TickingReplica(Replica):
        def __init__(self, config: ServiceConfig) -> None:
            super().__init__(config, lambda _: TickingEngine())

    return deployed(config, TickingReplica)


def main() -> None:
    """Serve until a signal."""
    kind, port = sys.argv[1], int(sys.argv[2])
    config = settings(port)
    if kind == "standalone":
        import uvicorn

        from service.api.app import create_app

        engine = TickingEngine()
        engine.start()
        uvicorn.run(create_app(engine, config), port=port, log_level="warning")
        return
    from service.cluster import local_cluster

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with local_cluster(config, application):
            threading.Event().wait()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
