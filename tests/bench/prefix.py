"""Questions about a document, with what was computed for others and without.

    python tests/bench/prefix.py [--tokens 16384] [--turns 5] [--threads 2] [--output FILE]

Two engines serve the bundled model on this CPU, one without a prefix cache. In each turn a new
document is read with a first question; then its second question is asked of all: `off`, of the
engine without a cache; `cold`, of the other under a salt that nothing was kept under; `warm`, as it
is. The cache holds three documents and is full from the second turn on, so that `cold` also takes
its pages from others. Exits with 1 where an answer depends on any of it.

Then four questions about one more document come at once, to each engine: `off together`, each
computes it; `on together`, one does. These answers may differ by rounding: other chunks share their
steps.

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
    from collections.abc import Sequence

    from service.engine.engine import Engine

    Prompts = list[list[int]]

SIDES = ("off", "cold", "warm")
TOGETHER = ("off together", "on together")
AT_ONCE = 4
"""Questions about one document that come together."""
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
    """One answer, or several that were asked for at once."""

    seconds: float  # to the first token, of the last one
    cpu: float  # seconds of CPU time until then
    cached: int  # tokens of the prompts
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
    without_to_this: float  # `cold` over this, or `off together`, by the clock
    without_to_this_cpu: float  # by CPU time


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


async def ask_together(engine: Engine, prompts: list[list[int]], number: int) -> Asked:
    """Several at once; until all have their first token."""
    asked = await asyncio.gather(*(ask(engine, prompt, "", number) for prompt in prompts))
    return Asked(
        max(one.seconds for one in asked),
        max(one.cpu for one in asked),
        sum(one.cached for one in asked),
        tuple(token for one in asked for token in one.tokens),
    )


def prompts_of(engine: Engine, number: int, tokens: int, questions: Sequence[str]) -> Prompts:
    """Questions about the document of that number, `tokens` tokens each."""
    encode = engine.tokenizer.encode
    document = encode(prose(number, tokens * LETTERS), False)
    asked = (encode(text, False) for text in questions)
    return [document[: tokens - len(each)] + each for each in asked]


async def turn(number: int, engines: dict[str, Engine], tokens: int) -> dict[str, Asked]:
    """A document's second question, asked in all ways."""
    on, off = engines["on"], engines["off"]
    prompts = prompts_of(on, number, tokens, QUESTIONS)
    await ask(on, prompts[0], "", number)
    found = {}
    # Each goes first, second and last as often as the others.
    for side in SIDES[number % 3 :] + SIDES[: number % 3]:
        salt = f"turn {number}" if side == "cold" else ""
        found[side] = await ask(off if side == "off" else on, prompts[1], salt, number)
    return found


async def turn_together(number: int, engines: dict[str, Engine], tokens: int) -> dict[str, Asked]:
    """Questions about a new document, all at once."""
    questions = [f"\n\nQuestion {n}.{QUESTIONS[n % 2]}" for n in range(AT_ONCE)]
    prompts = prompts_of(engines["on"], number + 10**5, tokens, questions)
    return {
        side: await ask_together(engines[side.split()[0]], prompts, number)
        for side in TOGETHER[:: 1 if number % 2 else -1]
    }


def record(side: str, turns: list[dict[str, Asked]], tokens: int) -> Record:
    """What a side's turns say."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    without = TOGETHER[0] if side in TOGETHER else "cold"
    return Record(
        side,
        tokens * (AT_ONCE if side in TOGETHER else 1),
        int(statistics.median(one[side].cached for one in turns)),
        len(turns),
        median([one[side].seconds for one in turns]),
        median([one[side].cpu for one in turns]),
        median([one[without].seconds / one[side].seconds for one in turns]),
        median([one[without].cpu / one[side].cpu for one in turns]),
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
            # Without a cache those that come together share nothing.
            kv_cache_gib=(3.1 if name == "on" else AT_ONCE + 0.1) * given.tokens * 6500 / 2**30,
            max_model_len=given.tokens + 256,
        )
        engines[name] = build_engine(config)
        engines[name].start()
    try:

        async def all_turns() -> list[dict[str, Asked]]:
            await turn(10**6, engines, min(given.tokens, 4096))  # compiles, and is not counted
            turns = [await turn(number, engines, given.tokens) for number in range(given.turns)]
            for number, one in enumerate(turns):
                one |= await turn_together(number, engines, given.tokens)
            return turns

        turns = asyncio.run(all_turns())
    finally:
        for engine in engines.values():
            engine.stop()
    records = [record(side, turns, given.tokens) for side in (*SIDES, *TOGETHER)]
    for one in records:
        print(
            f"{one.side:12} first token after {one.ttft_s:.3f} s ({one.cpu_s:.3f} s of CPU), "
            f"{one.cached_tokens} of {one.prompt_tokens} tokens cached; without / this "
            f"{one.without_to_this:.2f} ({one.without_to_this_cpu:.2f} by CPU)"
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
