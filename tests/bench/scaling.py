"""Scaling, rolling updates, sessions and drains on a real Ray cluster: no request may fail.

    python tests/bench/scaling.py

Starts a private cluster with a tiny checkpoint and then, each with requests running all the time:

1. a load step: replicas are added for the queued tokens;
2. an update of the configuration under that load: every replica is replaced, new ones first;
3. the load's end: replicas go down to the least again; a configuration that does not start takes
   the place of none;
4. an update to a fixed number of replicas, old ones first, in which sessions have homes, a session
   that is too hot for one spreads, and a dead replica's sessions move;
5. an update while one stream outlives the drain: it ends with an error event, others end well.

Exits with 1 when something else happens. Times are printed and not judged, but for patience. What
it started it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Replicas are processes of their own.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from service.api.replica import HEADER  # noqa: E402
from service.cluster import local_cluster  # noqa: E402
from service.config import ServiceConfig  # noqa: E402
from service.load.client import Client, clock  # noqa: E402
from service.load.plan import Planned  # noqa: E402
from service.load.prompts import TokenIds  # noqa: E402
from service.load.target import Target  # noqa: E402
from service.processes import descendants  # noqa: E402
from tests.ports import free_port  # noqa: E402
from tests.service.conftest import write_checkpoint  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.load.outcome import Outcome

PATIENCE = 90.0
"""Seconds until whatever must happen has."""
MOST = 2
"""Replicas, as many as this needs: each takes seconds of a core to start."""
USERS = 16
PROMPT, OUTPUT = 200, 40
"""Tokens."""


class Load:
    """Users of a closed loop in a thread; all that they see is in `outcomes`."""

    def __init__(self, url: str, users: int) -> None:
        self.outcomes: list[Outcome] = []
        self._target = Target(url, "completions", "tiny")
        self._prompts = TokenIds(range(1, 250), 0)
        self._users = users
        self._stop = threading.Event()
        self._sent = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        async with aiohttp.ClientSession(connector=connector) as session:
            client = Client(session, self._target, PATIENCE, clock())
            await asyncio.gather(*(self._user(client) for _ in range(self._users)))

    async def _user(self, client: Client) -> None:
        while not self._stop.is_set():
            self._sent += 1
            planned = Planned(None, PROMPT, OUTPUT, 0, 0, (), self._sent)
            body = self._target.body(planned, self._prompts)
            self.outcomes.append(await client.send(body, None, PROMPT))


class Run:
    """The cluster's address, its replicas over time, and what went wrong."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.problems: list[str] = []
        self.counts: list[int] = []  # of running replicas, whenever they changed
        # A connection a request: an idle one may be closed as the next request goes out.
        self.client = httpx.Client(
            timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", flush=True)

    def check(self, good: bool, text: str) -> None:
        self.say(f"{'ok    ' if good else 'FAILED'} {text}")
        if not good:
            self.problems.append(text)

    def running(self) -> int:
        from ray import serve

        application = serve.status().applications["saccade"]
        states = application.deployments["saccade"].replica_states
        count = int(states.get("RUNNING", 0))  # type: ignore[call-overload]
        if not self.counts or self.counts[-1] != count:
            self.counts.append(count)
            self.say(f"       {count} replicas run")
        return count

    def until(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.2)
        return False

    def deploy(self, config: ServiceConfig) -> None:
        from ray import serve

        from service.deployment import NAME, build

        serve.run(build(config), name=NAME, route_prefix="/")

    def no_failure(self, load: Load, what: str) -> None:
        failed = [f"{one.error}: {one.detail}" for one in load.outcomes if one.error]
        short = [one for one in load.outcomes if not one.error and one.output_tokens != OUTPUT]
        self.check(
            bool(load.outcomes) and not failed and not short,
            f"{what}: {len(load.outcomes)} requests, {len(failed)} failed, {len(short)} cut short"
            + (f" ({Counter(failed).most_common(3)})" if failed else ""),
        )


def scale_and_update(run: Run, config: ServiceConfig) -> None:
    """Parts 1 to 3."""
    run.running()
    with Load(run.url, USERS) as load:
        grown = run.until(lambda: run.running() == MOST)
        run.check(grown, f"the load step takes 1 replica to {MOST}")
        before = len(load.outcomes)
        changed = {"sparsity": {"policy": "dense"}, "max_num_seqs": 3}
        run.deploy(ServiceConfig(**(config.model_dump() | changed)))
        after = len(load.outcomes)
        run.check(after > before, f"{after - before} requests ended during the update")

        def dense() -> bool:
            reports = [one.sparsity or {} for one in load.outcomes[-2 * USERS :]]
            return all(report.get("policy") == "dense" for report in reports)

        run.check(run.until(dense), "all answers come from replicas with the new configuration")
    run.no_failure(load, "load step and update")
    with Load(run.url, 1) as trickle:
        run.check(run.until(lambda: run.running() == 1), "without the load 1 replica remains")
    run.no_failure(trickle, "scale-down")
    with Load(run.url, 1) as load, tempfile.TemporaryDirectory() as folder:
        damaged = shutil.copytree(config.model, Path(folder) / "tiny")
        (damaged / "model.safetensors").write_bytes(b"damaged")
        try:
            run.deploy(ServiceConfig(**(config.model_dump() | {"model": damaged})))
        except RuntimeError:
            run.check(run.running() == 1, "a damaged checkpoint takes no replica's place")
        else:
            run.check(False, "a damaged checkpoint is refused")
    run.no_failure(load, "an update that fails")


def ask(run: Run, session: str, **fields: Any) -> str:
    """The replica that completes a session's prompt; where it fails, why."""
    body = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 2, "temperature": 0} | fields
    headers = {"x-session-id": session}
    try:
        answer = run.client.post(f"{run.url}/v1/completions", json=body, headers=headers)
    except httpx.TransportError as error:
        return f"failed: {error}"
    return answer.headers[HEADER] if answer.status_code == 200 else f"failed: {answer.text}"


def replica_processes() -> set[int]:
    """Of this cluster."""
    found = set()
    for process in descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"ServeReplica" in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                found.add(process.pid)
    return found


def keep_sessions(run: Run) -> None:
    """Part 4, with two idle replicas."""
    import ray

    sessions = [f"session {number}" for number in range(16)]
    # A replica runs before the proxies hear of it.
    run.until(lambda: len({ask(run, session) for session in sessions}) == 2)
    homes = {session: ask(run, session) for session in sessions}
    # In no order, so that taking turns does not look like affinity.
    shuffled = random.Random(0).sample(sessions * 3, 3 * len(sessions))
    again = [ask(run, one) == homes[one] for one in shuffled]
    run.check(all(again), "a session's requests go to one replica")
    split = Counter(homes.values())
    run.check(len(split) == 2, f"sessions spread: {dict(split)}")

    hot, long = sessions[0], {"max_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool:
        split = Counter(pool.map(lambda _: ask(run, hot, **long), range(12)))
    # Each has room for four, then the least busy takes it.
    good = split.keys() == set(homes.values()) and max(split.values()) <= 8
    run.check(good, f"a hot session spreads: {dict(split)}, its home is {homes[hot]}")
    run.check(ask(run, hot) == homes[hot], "and is back at its home when it is not hot")

    dead = homes[hot]
    alive = replica_processes()
    ray.kill(ray.get_actor(f"SERVE_REPLICA::saccade#saccade#{dead}", namespace="serve"))
    deadline = time.monotonic() + PATIENCE
    while alive <= replica_processes() and time.monotonic() < deadline:
        time.sleep(0.001)  # it answers until its process has gone
    moved = {session: ask(run, session) for session in sessions}
    failed = [told for told in moved.values() if told.startswith("failed")]
    # HAProxy may learn of it from the first request, over a connection that it used before.
    spared = 1 if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else 0
    told = f"after a replica's death {len(failed)} requests fail, {spared} may {failed[:1]}"
    run.check(len(failed) <= spared, told)
    others = {one: home for one, home in homes.items() if home != dead}
    left = [f"{one}: {moved[one]}" for one, home in others.items() if moved[one] != home]
    left += [f"{one}: the dead one" for one, name in moved.items() if name == dead]
    run.check(not left, f"its sessions move, others stay {left}")

    def replaced() -> bool:
        told = {ask(run, one) for one in sessions} - set(homes.values())
        return any(not name.startswith("failed") for name in told)

    run.check(run.until(replaced), "another replica takes its place")


def outlive(run: Run, config: ServiceConfig) -> None:
    """Part 5."""
    told: dict[str, list[str]] = {}

    def stream(name: str, tokens: int) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
        sent = {"json": body | {"stream": True}, "timeout": PATIENCE}
        told[name] = []
        with httpx.stream("POST", f"{run.url}/v1/completions", **sent) as answer:
            for line in answer.iter_lines():
                if line:
                    told[name].append(line.removeprefix("data: "))

    threads = [
        threading.Thread(target=stream, args=(name, tokens))
        for name, tokens in (("short", 500), ("long", 60_000))
    ]
    for thread in threads:
        thread.start()
    run.until(lambda: len(told) == 2 and all(told.values()))
    with Load(run.url, 2) as load:
        run.deploy(ServiceConfig(**(config.model_dump() | {"max_queue": 99})))
        for thread in threads:
            thread.join()
    for name, events in sorted(told.items()):
        *_, last, done = events
        error = json.loads(last).get("error")
        ended = (error is not None) == (name == "long")
        text = f"{len(events)} events, then {error['message'] if error else 'its end'}"
        run.check(ended and done == "[DONE]", f"a {name} stream: {text}")
    run.no_failure(load, "update with streams that outlive the drain")


@contextmanager
def checkpoint() -> Iterator[Path]:
    """A tiny model that may answer at any length."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder) / "tiny")
        file = model / "config.json"
        fields = json.loads(file.read_text())
        file.write_text(json.dumps(fields | {"max_position_embeddings": 65_536}))
        yield model


def main() -> None:
    """Run all parts; exit with 1 where one failed."""
    port = free_port()
    run = Run(f"http://127.0.0.1:{port}")
    with checkpoint() as model:
        fields = {
            "model": model,
            "port": port,
            "device": "cpu",
            "kv_cache_gib": 0.05,
            "max_num_seqs": 4,
            "drain_s": 15,
        }
        scaling = {
            "max_replicas": MOST,
            "queued_tokens_per_replica": 4 * PROMPT,
            "upscale_delay_s": 1,
            "downscale_delay_s": 5,
        }
        config = ServiceConfig(**fields, autoscaling=scaling, update_surge_percent=50)
        with local_cluster(config):
            run.say("started")
            scale_and_update(run, config)
            fixed = ServiceConfig(**fields, replicas=2)
            with Load(run.url, 1) as load:
                run.deploy(fixed)
                run.until(lambda: run.running() == 2)
            run.no_failure(load, "update to two fixed replicas")
            keep_sessions(run)
            outlive(run, fixed)
    run.say("stopped")
    if run.problems:
        raise SystemExit("\n".join(["failed:", *run.problems]))


if __name__ == "__main__":
    main()
