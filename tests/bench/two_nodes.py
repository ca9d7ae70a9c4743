"""Two Ray nodes, one of which is killed under load: who loses what, and what do scrapes say?

    python tests/bench/two_nodes.py

Starts a head and a worker node on this machine (`ray start`, random ports, a token), each with a
proxy and one replica of a tiny random model, and does not prefer either node: requests through
either proxy run on either replica. Then

- 18 requests through both proxies; every scrape at either says 18, two seconds after the last one;
- streams through both; all processes of the worker node are killed at once in their midst. Those
  that its replica computed end with an error event at the head's proxy, requests without streaming
  with a 503; those through its own proxy are cut, which no one is left to explain; the others go on
  to their end;
- from before to long after, scrapes at the head's proxy all succeed and no counter goes back, and
  what the dead replica counted is missing at most one interval's tokens.

Exits with 1, and says what, where that does not hold. What it started it stops.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from service.load.client import Client, clock  # noqa: E402
from service.load.target import Target  # noqa: E402
from service.metrics_reporter import INTERVAL  # noqa: E402
from tests.service.conftest import write_checkpoint  # noqa: E402
from tests.service.nodes import Nodes, two_nodes  # noqa: E402

if TYPE_CHECKING:
    from service.load.outcome import Outcome

REQUESTS = 18
STREAMS = (10, 4)
"""Through the head's proxy, and through the worker's."""
WHOLE = 6
"""Requests without streaming, through the head's proxy."""
TOKENS = 1500
"""Of each stream; together they are not done before the node is killed."""
AFTER = 20.0
"""Seconds of scrapes behind the kill: Serve and Ray have noticed, and gauges have gone."""


@dataclass(slots=True)
class Scrapes:
    """What scrapes said, one after the other.

    Attributes:
        problems: failed ones, and counters that went back.
        last: values of the last one, by name and labels.
        slowest: seconds that one took.
    """

    problems: list[str] = field(default_factory=list)
    last: dict[tuple[object, ...], float] = field(default_factory=dict)
    number: int = 0
    slowest: float = 0.0

    async def scrape(self, session: aiohttp.ClientSession, url: str) -> None:
        """One more."""
        start = time.perf_counter()
        try:
            async with session.get(f"{url}/metrics") as answer:
                status, text = answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.problems.append(f"a scrape failed: {error!r}")
            return
        self.slowest = max(self.slowest, time.perf_counter() - start)
        self.number += 1
        if status != 200:
            self.problems.append(f"a scrape answered {status}: {text[:200]}")
            return
        found = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if family.type != "gauge"
        }
        self.problems += [
            f"{series} went from {before} to {found.get(series)}"
            for series, before in self.last.items()
            if found.get(series, -1.0) < before
        ]
        self.last = found

    def total(self, name: str, **labels: str) -> float:
        """The sum over the series of a name with these labels, in the last scrape."""
        return sum(
            value
            for (series, *found), value in self.last.items()
            if series == f"saccade_{name}" and set(labels.items()) <= set(found)
        )


def body(tokens: int, *, stream: bool = True) -> bytes:
    """Of a request."""
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    asked = {"model": "tiny", "prompt": "x" * 50, "max_tokens": tokens, "ignore_eos": True}
    return json.dumps(asked | streaming).encode()


async def answer_at_once(session: aiohttp.ClientSession, url: str) -> str:
    """What became of a request without streaming: "whole", or the error's code."""
    headers, patience = {"Content-Type": "application/json"}, aiohttp.ClientTimeout(total=300)
    async with session.post(
        f"{url}/v1/completions", data=body(TOKENS, stream=False), headers=headers, timeout=patience
    ) as answer:
        told = await answer.json()
        return "whole" if answer.status == 200 else f"{answer.status} {told['error']['code']}"


async def equal_totals(session: aiohttp.ClientSession, nodes: Nodes) -> list[str]:
    """Requests through both proxies, and scrapes at both."""
    now = clock()
    for index in range(REQUESTS):
        client = Client(session, Target(nodes.urls[index % 2], "completions", "tiny"), 60, now)
        outcome = await client.send(body(5), None, 50)
        if outcome.error:
            return [f"a request failed: {outcome.error} {outcome.detail}"]
    await asyncio.sleep(2)
    found = []
    for index in range(20):
        scrapes = Scrapes()
        await scrapes.scrape(session, nodes.urls[index % 2])
        found += scrapes.problems
        total = scrapes.total("request_success_total", finished_reason="length")
        if total != REQUESTS or scrapes.total("generation_tokens_total") != 5 * REQUESTS:
            found.append(f"scrape {index} says {total:g} requests instead of {REQUESTS}")
    print(f"{REQUESTS} requests through both nodes: 20 scrapes at both read")
    return found


async def one_node_dies(session: aiohttp.ClientSession, nodes: Nodes) -> list[str]:
    """Streams through both proxies, and the worker node's death in their midst."""
    now, scrapes = clock(), Scrapes()
    urls = [url for url, number in zip(nodes.urls, STREAMS, strict=True) for _ in range(number)]
    running = [
        asyncio.create_task(
            Client(session, Target(url, "completions", "tiny"), 300, now).send(
                body(TOKENS), None, 50
            )
        )
        for url in urls
    ]
    at_once = [asyncio.create_task(answer_at_once(session, nodes.urls[0])) for _ in range(WHOLE)]
    while scrapes.total("generation_tokens_total") < 5 * REQUESTS + 20 * (len(urls) + WHOLE):
        await scrapes.scrape(session, nodes.urls[0])
        await asyncio.sleep(0.1)
        if any(task.done() for task in running):
            return [*scrapes.problems, "a stream ended before the node was killed"]
    await asyncio.to_thread(nodes.kill_worker)
    killed = now()
    while now() < killed + AFTER or not all(task.done() for task in (*running, *at_once)):
        await scrapes.scrape(session, nodes.urls[0])
        await asyncio.sleep(0.2)
    outcomes, answers = await asyncio.gather(*running), await asyncio.gather(*at_once)
    await asyncio.sleep(2 * INTERVAL)
    await scrapes.scrape(session, nodes.urls[0])
    return [*scrapes.problems, *told(scrapes, outcomes, answers, killed)]


def told(scrapes: Scrapes, outcomes: list[Outcome], answers: list[str], killed: float) -> list[str]:
    """Whether each request ended as it should, and is counted."""
    head, worker = outcomes[: STREAMS[0]], outcomes[STREAMS[0] :]
    kinds = [collections.Counter(one.error for one in part) for part in (head, worker)]
    whole = [one for one in head if one.error is None]
    lost = [one for one in head if one.error == "stream error"]
    noticed = max((one.ended - killed for one in lost), default=0.0)
    sent = 5 * REQUESTS + sum(len(one.tokens_at) for one in outcomes)
    sent += TOKENS * answers.count("whole")
    counted = scrapes.total("generation_tokens_total")
    print(
        f"streams through the head's proxy: {dict(kinds[0])}, the worker's: {dict(kinds[1])}\n"
        f"requests without streaming: {dict(collections.Counter(answers))}\n"
        f"the lost ones were told within {noticed:.1f} s: {lost[0].detail if lost else '-'}\n"
        f"{scrapes.number} scrapes, the slowest {scrapes.slowest:.2f} s\n"
        f"tokens sent {sent}, counted {counted:g}"
    )
    found = []
    if not whole or not lost or len(whole) + len(lost) != len(head):
        found.append(f"streams through the head's proxy ended as {dict(kinds[0])}")
    if set(kinds[1]) != {"truncated"}:
        found.append(f"streams through the worker's proxy ended as {dict(kinds[1])}")
    if set(answers) - {"whole", "503 replica_lost"}:
        found.append(f"requests without streaming ended as {answers}")
    if any(one.output_tokens != TOKENS for one in whole):
        found.append("a stream that is whole is not")
    done = scrapes.total("request_success_total", finished_reason="length")
    answered = REQUESTS + len(whole) + answers.count("whole")
    if done != answered:
        found.append(f"{done:g} requests are counted, {answered} were answered")
    # Of the lost streams, what came since the last report; of those cut, what was under way.
    rate = max(len(one.tokens_at) / (one.ended - one.sent) for one in outcomes)
    if counted < sent - 2 * INTERVAL * rate * len(outcomes):
        found.append(f"{sent} tokens were sent and only {counted:g} are counted")
    return found


async def check(nodes: Nodes) -> list[str]:
    """Everything that does not hold."""
    limits = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(connector=limits, timeout=timeout) as session:
        return await equal_totals(session, nodes) or await one_node_dies(session, nodes)


def main() -> int:
    """Run it; 0 when everything holds."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny", max_model_len=4096)
        config = {
            "model": str(checkpoint),
            "dtype": "float32",
            "device": "cpu",
            "kv_cache_gib": 0.05,
            "replicas": 2,
        }
        with two_nodes(config) as nodes:
            problems = asyncio.run(check(nodes))
    print("\n".join(problems) or "one service on two nodes, and on one when the other dies")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
