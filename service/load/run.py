"""Puts a plan on a server: an open loop, which waits for nobody, or a closed one."""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
from tqdm import tqdm

from service.load.client import Client, clock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Never

    from service.load.outcome import Outcome
    from service.load.plan import Planned
    from service.load.prompts import Prompts
    from service.load.target import Target

_AHEAD = 0.5
"""Seconds before a request is due in which its prompt is written."""


@dataclass(frozen=True, slots=True)
class Loop:
    """How requests follow each other.

    Attributes:
        users: of a closed loop, each of which sends when its last answer has ended; None for an
            open loop, which sends each request when it is due.
        timeout: seconds a request.
        duration: seconds after which a closed loop starts no more requests; None for all.
    """

    users: int | None
    timeout: float
    duration: float | None = None


async def run(
    plan: Sequence[Planned],
    target: Target,
    prompts: Prompts,
    loop: Loop,
    *,
    name: str,
    warmup: Sequence[Planned] = (),
) -> list[Outcome]:
    """Send every request of a plan and read all answers.

    Args:
        plan: what to send.
        target: where to.
        prompts: writes them.
        loop: how they follow each other.
        name: of the progress bar.
        warmup: requests sent before, one after the other, that are not measured.
    """
    _open_files()
    # Servers close idle connections, uvicorn after five seconds: a request must not meet that.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with aiohttp.ClientSession(connector=connector) as session:
        first = Client(session, target, loop.timeout, clock())
        for planned in warmup:
            await first.send(
                target.body(planned, prompts), None, planned.prompt_tokens, planned.session
            )
        with tqdm(total=len(plan), desc=name, unit="request", leave=False) as progress:
            if loop.users is None:
                return await _open(plan, target, prompts, loop, session, progress)
            return await _closed(plan, target, prompts, loop, session, progress)


async def _open(
    plan: Sequence[Planned],
    target: Target,
    prompts: Prompts,
    loop: Loop,
    session: aiohttp.ClientSession,
    progress: tqdm[Never],
) -> list[Outcome]:
    # Prompts are written ahead, in a thread: a long one takes a while, and must not be late.
    written: asyncio.Queue[tuple[Planned, bytes]] = asyncio.Queue(64)
    now = clock()

    async def write() -> None:
        for planned in plan:
            assert planned.at is not None
            await asyncio.sleep(planned.at - _AHEAD - now())
            await written.put((planned, await asyncio.to_thread(target.body, planned, prompts)))

    async def one(body: bytes, planned: Planned) -> Outcome:
        outcome = await client.send(body, planned.at, planned.prompt_tokens, planned.session)
        progress.update()
        return outcome

    # The first prompts are there before the clock starts.
    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        head = await written.get()
        now = clock()
        client = Client(session, target, loop.timeout, now)
        sent: list[asyncio.Task[Outcome]] = []
        for number in range(len(plan)):
            planned, body = head if number == 0 else await written.get()
            assert planned.at is not None
            await asyncio.sleep(planned.at - now())
            sent.append(group.create_task(one(body, planned)))
    return [task.result() for task in sent]


async def _closed(
    plan: Sequence[Planned],
    target: Target,
    prompts: Prompts,
    loop: Loop,
    session: aiohttp.ClientSession,
    progress: tqdm[Never],
) -> list[Outcome]:
    assert loop.users is not None
    now = clock()
    client = Client(session, target, loop.timeout, now)
    left, outcomes = iter(plan), []

    async def user() -> None:
        for planned in left:
            body = await asyncio.to_thread(target.body, planned, prompts)
            if loop.duration is not None and now() >= loop.duration:
                return
            outcome = await client.send(body, None, planned.prompt_tokens, planned.session)
            outcomes.append(outcome)
            progress.update()

    await asyncio.gather(*(user() for _ in range(loop.users)))
    return outcomes


def _open_files() -> None:
    """Allow as many connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
