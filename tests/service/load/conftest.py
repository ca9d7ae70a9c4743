"""A server that answers as a script says, and stamps what it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from service.load.client import Client, clock
from service.load.plan import Planned
from service.load.target import Target


@dataclass
class Stamps:
    """Of one request: `time.perf_counter()`."""

    received: float
    written: list[float] = field(default_factory=list)


class Scripted:
    """Plays `script(number, response)` for every request, after the headers."""

    def __init__(self, script, prepare=True):
        self.script = script
        self.prepare = prepare
        self.stamps = []
        self.bodies = []
        self.headers = []

    async def handle(self, request):
        self.headers.append(request.headers)
        self.bodies.append(await request.json())
        self.stamps.append(Stamps(time.perf_counter()))
        number = len(self.stamps) - 1
        if not self.prepare:
            return await self.script(number, request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await self.script(number, response)
        return response

    async def token(self, number, response, text=" x"):
        self.stamps[number].written.append(time.perf_counter())
        await response.write(event({"choices": [{"index": 0, "text": text}]}))


def event(value):
    data = value if isinstance(value, str) else json.dumps(value)
    return f"data: {data}\n\n".encode()


async def end(response, tokens=None, **fields):
    """The usage and [DONE]."""
    usage = None if tokens is None else {"prompt_tokens": 7, "completion_tokens": tokens}
    await response.write(event({"choices": [], "usage": usage} | fields))
    await response.write(event("[DONE]"))


@contextlib.asynccontextmanager
async def listening(scripted):
    """Its base URL on a port of its own, in this loop."""
    app = web.Application()
    app.router.add_post("/{path:.*}", scripted.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Nothing:
    """Prompts of no interest."""

    def make(self, planned):
        return [1] * planned.prompt_tokens


def planned(at=None, tokens=3, output=5, **fields):
    defaults = {"prefix_tokens": 0, "group": 0, "blocks": (), "seed": 0}
    return Planned(at, tokens, output, **(defaults | fields))


def target(url, **fields):
    return Target(url, **({"endpoint": "completions", "model": "m"} | fields))


def send(scripted, *, timeout=20.0, **fields):
    """One request to a scripted server; its outcome."""

    async def one():
        async with listening(scripted) as url, aiohttp.ClientSession() as session:
            client = Client(session, target(url, **fields), timeout, clock())
            body = target(url, **fields).body(planned(), Nothing())
            return await client.send(body, None, 3)

    return asyncio.run(asyncio.wait_for(one(), 60))
