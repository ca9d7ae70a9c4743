"""What Ray Serve adds to a stream: inter-token latency through it, against one process of uvicorn.

    python tests/bench/streams.py [--commit HASH] [--output FILE] [--turns 3] [--tokens 150]

Starts the service both ways on two cores, each over an engine that computes nothing and gives every
stream one token each 20 ms (tests/bench/ticking.py), and reads many streams at once from this
process, on the same cores, the sides in turn. Exits with 1 when the 99th percentile through Ray
Serve is more than 1.5 times uvicorn's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.envelope import as_json, current_commit, envelope  # noqa: E402  (runs uninstalled)
from service.load.client import Client, clock  # noqa: E402
from service.load.target import Target  # noqa: E402
from tests.bench.running import running  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.load.outcome import Outcome
    from tests.bench.running import Service

SIDES = ("standalone", "ray")
LIMIT = 1.5
"""Times uvicorn's 99th percentile."""
START = 300
"""Seconds that a service has to start."""
SETTLE = 3
"""Seconds in which nothing is asked: what Ray spends in them it would spend without load, too."""


@dataclass(frozen=True, slots=True)
class Record:
    """One side; medians over its turns."""

    side: str
    streams: int
    turns: int
    tokens: int  # read in all turns
    itl_ms_p50: float
    itl_ms_p99: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    cpu_s_per_1000_tokens: float  # of all of the service's processes
    idle_cpu_s_per_s: float  # of them, without a request
    p99_to_standalone: float  # median over the turns, each against its neighbour


@dataclass(frozen=True, slots=True)
class Turn:
    """All streams of one side, once."""

    gaps: list[float]  # seconds between one token and the next
    ttfts: list[float]
    cpu: float  # seconds of the service's processes

    def percentile(self, percent: float) -> float:
        """Of the gaps."""
        return float(np.percentile(self.gaps, percent))


def ticking(side: str) -> Callable[[int], list[str]]:
    """Python's arguments for one side, on a port."""
    return lambda port: [str(ROOT / "tests/bench/ticking.py"), side, str(port)]


async def read(url: str, streams: int, tokens: int) -> list[Outcome]:
    """All streams, opened at once."""
    target = Target(url, "completions", "ticking")
    asked = {"model": target.model, "prompt": "go", "max_tokens": tokens, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, target, 60 + tokens, clock())
        return await asyncio.gather(*(client.send(body, None, 1) for _ in range(streams)))


def turn(side: Service, streams: int, tokens: int) -> Turn:
    """Read all streams once.

    Raises:
        SystemExit: one failed, or brought less than was asked for.
    """
    before = side.cpu()
    outcomes = asyncio.run(read(side.url, streams, tokens))
    cpu = side.cpu() - before
    for one in outcomes:
        if one.error or len(one.tokens_at) != tokens:
            raise SystemExit(f"a stream failed: {one.error} {one.detail} {len(one.tokens_at)}")
    return Turn(
        [gap for one in outcomes for gap in one.gaps], [one.ttft or 0.0 for one in outcomes], cpu
    )


def record(side: str, turns: list[Turn], reference: list[Turn], idle: float) -> Record:
    """What a side's turns say."""
    streams, tokens = len(turns[0].ttfts), len(turns[0].gaps) + len(turns[0].ttfts)

    def milliseconds(values: list[float]) -> float:
        return round(1e3 * statistics.median(values), 1)

    return Record(
        side,
        streams,
        len(turns),
        tokens * len(turns),
        milliseconds([one.percentile(50) for one in turns]),
        milliseconds([one.percentile(99) for one in turns]),
        milliseconds([float(np.percentile(one.ttfts, 50)) for one in turns]),
        milliseconds([float(np.percentile(one.ttfts, 99)) for one in turns]),
        round(statistics.median(one.cpu for one in turns) / tokens * 1e3, 3),
        round(idle, 3),
        round(
            statistics.median(
                one.percentile(99) / other.percentile(99)
                for one, other in zip(turns, reference, strict=True)
            ),
            2,
        ),
    )


def main() -> int:
    """Measure both sides, write the records, and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150, help="a stream, each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="for the services and this client")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: given.cores]
    os.sched_setaffinity(0, cores)

    turns: dict[str, list[Turn]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        services = {side: stack.enter_context(running(ticking(side), START)) for side in SIDES}
        for one in services.values():
            turn(one, given.streams, 10)
        before = {side: one.cpu() for side, one in services.items()}
        time.sleep(SETTLE)
        idle = {side: (one.cpu() - before[side]) / SETTLE for side, one in services.items()}
        for number in range(given.turns):
            # Each side goes first as often as the other.
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                turns[side].append(turn(services[side], given.streams, given.tokens))
    records = [record(side, turns[side], turns["standalone"], idle[side]) for side in SIDES]
    for one in records:
        print(
            f"{one.side:10} inter-token p50 {one.itl_ms_p50:.1f} ms, p99 {one.itl_ms_p99:.1f} ms; "
            f"first token p50 {one.ttft_ms_p50:.1f} ms, p99 {one.ttft_ms_p99:.1f} ms; "
            f"{one.cpu_s_per_1000_tokens:.3f} s of CPU a 1000 tokens, {one.idle_cpu_s_per_s:.3f} "
            "a second without load"
        )
    ratio = records[-1].p99_to_standalone
    print(f"p99 through Ray Serve: {ratio} times uvicorn's; the limit is {LIMIT}")
    if given.output is not None:
        head = envelope(
            shlex.join(["python", *sys.argv]),
            given.commit or current_commit(),
            f"{platform.processor() or platform.machine()}, {len(cores)} cores",
            {"streams": given.streams, "tokens": given.tokens, "tick_ms": 20, "cores": len(cores)},
        )
        given.output.write_text(as_json(head, records), encoding="utf-8")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
