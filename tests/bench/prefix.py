"""The second question about a document, with what was computed for the first and without.

    python tests/bench/prefix.py [--tokens 16384] [--turns 5] [--threads 2] [--output FILE]

Two engines serve the bundled model on this CPU, one without a prefix cache. In each turn a new
document is read with a first question; then its second question is asked of all: `off`, of the
engine without a cache; `cold`, of the other under a salt that nothing was kept under; `warm`, as it
is. The cache holds three documents and is full from the second turn on, so that `cold` also takes
its pages from others. Exits with 1 where an answer depends on any of it.

Seconds of CPU time stand beside those of the clock: others may run on the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.training.filler import prose  # noqa: E402  (the script also runs uninstalled)
from service.config import ServiceConfig  # noqa: E402
from service.engine.build import build_engine, machine_name  # noqa: E402
from service.engine.types import SamplingParams  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402

if TYPE_CHECKING:
    from service.engine.engine import Engine

SIDES = ("off", "cold", "warm")
LETTERS = 6
"""Of a token, at most about: so much text is made and then cut."""
ANSWER = 16
"""Tokens of an answer."""
QUESTIONS = (
    "\n\nWhat is the first thing that is told of here? Answer in one sentence:",
    "\n\nWho is spoken of, where are they, and what do they do there? Answer in one sentence:",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer."""

    seconds: float  # to the first token
    cpu: float  # seconds of CPU time until then
    cached: int  # tokens of the prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One side; medians over the turns, and of the ratios of each turn."""

    side: str
    prompt_tokens: int
    cached_tokens: int
    turns: int
    ttft_s: float
    cpu_s: float
    cold_to_this: float  # cold over this, by the clock
    cold_to_this_cpu: float  # by CPU time


async def ask(engine: Engine, prompt: list[int], salt: str, number: int) -> Asked:
    """One request to the engine, alone."""
    sparsity = ServiceConfig().sparsity.resolve()
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    began, spent = time.perf_counter(), time.process_time()
    stream = engine.submit(
        prompt, sampling, sparsity, request_id=f"{number}-{began}", cache_salt=salt
    )
    first = await anext(stream)
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    deltas = [first, *[delta async for delta in stream]]
    if deltas[-1].error:
        sys.exit(deltas[-1].error)
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    return Asked(seconds, cpu, first.cached_tokens, tokens)


async def turn(number: int, engines: dict[str, Engine], tokens: int) -> dict[str, Asked]:
    """A document's second question, asked in all ways."""
    on, off = engines["on"], engines["off"]
    encode = on.tokenizer.encode
    document = encode(prose(number, tokens * LETTERS), False)
    first, second = (encode(text, False) for text in QUESTIONS)
    prompts = [document[: tokens - len(each)] + each for each in (first, second)]
    await ask(on, prompts[0], "", number)
    found = {}
    # Each goes first, second and last as often as the others.
    for side in SIDES[number % 3 :] + SIDES[: number % 3]:
        salt = f"turn {number}" if side == "cold" else ""
        found[side] = await ask(off if side == "off" else on, prompts[1], salt, number)
    return found


def record(side: str, turns: list[dict[str, Asked]], tokens: int) -> Record:
    """What a side's turns say."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return Record(
        side,
        tokens,
        int(statistics.median(one[side].cached for one in turns)),
        len(turns),
        median([one[side].seconds for one in turns]),
        median([one[side].cpu for one in turns]),
        median([one["cold"].seconds / one[side].seconds for one in turns]),
        median([one["cold"].cpu / one[side].cpu for one in turns]),
    )


def main() -> int:
    """Measure, print, write the records, and say whether the answers agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=16_384, help="of a prompt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    engines = {}
    for name in ("on", "off"):
        config = ServiceConfig(
            device="cpu",
            dtype=given.dtype,
            prefix_cache=name == "on",
            kv_cache_gib=3.1 * given.tokens * 6500 / 2**30,
            max_model_len=given.tokens + 256,
        )
        engines[name] = build_engine(config)
        engines[name].start()
    try:

        async def all_turns() -> list[dict[str, Asked]]:
            await turn(10**6, engines, min(given.tokens, 4096))  # compiles, and is not counted
            return [await turn(number, engines, given.tokens) for number in range(given.turns)]

        turns = asyncio.run(all_turns())
    finally:
        for engine in engines.values():
            engine.stop()
    records = [record(side, turns, given.tokens) for side in SIDES]
    for one in records:
        print(
            f"{one.side:5} first token after {one.ttft_s:.3f} s ({one.cpu_s:.3f} s of CPU), "
            f"{one.cached_tokens} of {one.prompt_tokens} tokens cached; cold / this "
            f"{one.cold_to_this:.2f} ({one.cold_to_this_cpu:.2f} by CPU)"
        )
    equal = sum(len({one[side].tokens for side in SIDES}) == 1 for one in turns)
    print(f"answers that are the same three times: {equal} of {len(turns)}")
    if given.output is not None:
        head = envelope(
            shlex.join(["python", *sys.argv]),
            given.commit or current_commit(),
            machine_name(torch.device("cpu")),
            {"tokens": given.tokens, "answers_equal": equal},
        )
        given.output.write_text(as_json(head, records), encoding="utf-8")
    return int(equal < len(turns))


if __name__ == "__main__":
    sys.exit(main())
