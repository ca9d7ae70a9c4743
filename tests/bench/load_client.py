"""How many one-token events a second `saccade bench serve` reads on one core; httpx beside it.

    python tests/bench/load_client.py

A server in a process of its own streams to many connections at once, once so slowly that every
event is a read of its own, which costs the most, and once as fast as the client reads. The figure
is events by seconds of the client's CPU time: what one core reads when it does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.load.client import Client, clock  # noqa: E402  (the script also runs uninstalled)
from service.load.target import Target  # noqa: E402

BODY = b"{}"
CHUNK = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1_764_000_000,
    "model": "saccade-12m",
    "system_fingerprint": "saccade-0.1.0",
    "choices": [
        {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ],
    "usage": None,
}


@dataclass(frozen=True, slots=True)
class Stream:
    """What the server sends on each connection."""

    events: int
    rate: float | None  # events a second; None: as fast as they are read


def serve(listener: socket.socket, stream: Stream) -> None:
    """Answer every request with the stream, until killed."""

    def framed(data: str) -> bytes:
        event = f"data: {data}\n\n".encode()
        return b"%x\r\n%b\r\n" % (len(event), event)

    token, end = framed(json.dumps(CHUNK, separators=(",", ":"))), framed("[DONE]") + b"0\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(BODY))  # what is not read resets the connection
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        start = time.perf_counter()
        for number in range(stream.events):
            writer.write(token)
            if stream.rate is not None:
                await asyncio.sleep(start + (number + 1) / stream.rate - time.perf_counter())
            elif number % 64 == 0:
                await writer.drain()
        writer.write(end)
        await writer.drain()
        writer.close()

    async def forever() -> None:
        server = await asyncio.start_server(answer, sock=listener, backlog=4096)
        await server.serve_forever()

    asyncio.run(forever())


async def with_ours(url: str, streams: int) -> int:
    """Events that the load generator's client reads."""
    target = Target(url, "completions", "m")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, target, 600, clock())
        outcomes = await asyncio.gather(*(client.send(BODY, None, 1) for _ in range(streams)))
    failed = [one.error for one in outcomes if one.error]
    if failed:
        raise SystemExit(f"{len(failed)} streams failed: {failed[0]}")
    return sum(len(one.tokens_at) for one in outcomes)


async def with_httpx(url: str, streams: int) -> int:
    """Events that httpx reads, as the same JSON."""
    limits = httpx.Limits(max_connections=None)

    async def one(client: httpx.AsyncClient) -> int:
        async with client.stream("POST", f"{url}/v1/completions", content=BODY) as answer:
            times = [
                time.perf_counter()
                async for line in answer.aiter_lines()
                if line.startswith("data: {") and json.loads(line[6:])["choices"]
            ]
        return len(times)

    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        return sum(await asyncio.gather(*(one(client) for _ in range(streams))))


def measure(read, streams: int, stream: Stream) -> tuple[float, float]:
    """Events a second of the client's CPU time, and of the wall clock."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listener, stream))
        server.start()
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            events = asyncio.run(read(url, streams))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        finally:
            server.terminate()
            server.join()
    if events != streams * stream.events:
        raise SystemExit(f"{events} events came instead of {streams * stream.events}")
    return events / cpu, events / wall


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--events", type=int, default=250, help="a stream")
    parser.add_argument("--rate", type=float, default=50.0, help="events a second and stream")
    given = parser.parse_args()
    print(f"{given.streams} streams of {given.events} events")
    print(f"{'client':<8} {'server':<12} {'events / CPU second':>20} {'events / second':>16}")
    for rate in (given.rate, None):
        for name, read in (("ours", with_ours), ("httpx", with_httpx)):
            cpu, wall = measure(read, given.streams, Stream(given.events, rate))
            pace = "unlimited" if rate is None else f"{rate:g}/s each"
            print(f"{name:<8} {pace:<12} {cpu:>20,.0f} {wall:>16,.0f}", flush=True)


if __name__ == "__main__":
    main()
