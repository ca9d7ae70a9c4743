"""A load above what whole budgets bear, with brownout off and on: the bundled model on a CPU.

    python tests/bench/brownout.py --json out.json

Time is the CPU time of the engine's thread, so that other work on the machine does not count: the
engine, the model and the scheduler are the real ones, and only their clock is another. Where
nothing is left to do it jumps to the next request.

A request is a document of `--tokens` random tokens and `--choices` answers to it, so that much of
what costs is decoding; the budget is a wide one, `--max-keys`. What one request takes alone is
measured first, with its whole budget, the default one, the smallest, and the pattern. With
`--repeats 0` that is all. Then requests come `--overload` times
as fast as one is done alone, with brownout off and on. All run at once: more load is a larger step,
and a longer wait for each token. A request is good whose mean time between tokens is within the
target, `--slo` times what it is alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.budget import SAMPLE  # noqa: E402  (the script also runs uninstalled)
from service.config import ServiceConfig  # noqa: E402
from service.engine import engine as engine_module  # noqa: E402
from service.engine import measures  # noqa: E402
from service.engine.build import build_engine, machine_name  # noqa: E402
from service.engine.types import SamplingParams  # noqa: E402

if TYPE_CHECKING:
    from service.engine.engine import Engine
    from service.engine.types import SparsityParams, SparsityReport


@dataclass(slots=True)
class Answered:
    """What a client saw of one request; seconds, from when it was due."""

    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    reports: list[SparsityReport] = field(default_factory=list)


class Clock:
    """The CPU time of an engine's thread, in place of the module `time` of the engine's modules."""

    def __init__(self) -> None:
        self._skipped = 0.0
        self._thread: int | None = None

    def follow(self, engine: Engine) -> None:
        """Be this engine's from now on."""
        ident = engine._thread.ident
        assert ident is not None
        self._thread = time.pthread_getcpuclockid(ident)

    def monotonic(self) -> float:
        """Seconds."""
        running = 0.0 if self._thread is None else time.clock_gettime(self._thread)
        return self._skipped + running

    def skip(self, seconds: float) -> None:
        """Let time pass in which the thread does nothing."""
        self._skipped += max(0.0, seconds)


class Client:
    """Requests to one engine, each of a document of its own."""

    def __init__(self, engine: Engine, clock: Clock, options: argparse.Namespace) -> None:
        self.engine, self.clock, self.options = engine, clock, options
        self.generator = torch.Generator().manual_seed(0)
        self.count = self.open = 0  # requests begun, and those not yet answered
        self.due: list[float] = []  # of those to come

    async def ask(self, due: float, sparsity: SparsityParams) -> Answered:
        """One request, from `due` on."""
        self.due.append(due)
        while (now := self.clock.monotonic()) < due:
            if self.open == 0:
                self.clock.skip(min(self.due) - now)
            await asyncio.sleep(0.002)
        self.due.remove(due)
        vocab, options = self.engine.config.vocab_size, self.options
        prompt = torch.randint(300, vocab, (options.tokens,), generator=self.generator)
        self.count, self.open = self.count + 1, self.open + 1
        stream = self.engine.submit(
            prompt.tolist(),
            SamplingParams(max_tokens=options.new, temperature=0.0, ignore_eos=True),
            sparsity,
            n=options.choices,
            request_id=str(self.count),
        )
        found, came = Answered(), {}
        async for delta in stream:
            now = self.clock.monotonic()
            found.first = found.first or now - due
            if delta.index in came:
                found.gaps.append(now - came[delta.index])
            came[delta.index] = now
            if delta.sparsity is not None:
                found.reports.append(delta.sparsity)
        found.last = self.clock.monotonic() - due
        self.open -= 1
        return found


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """What requests ask for: so many keys, however much mass fewer would carry."""
    keys = options.max_keys
    return {"coverage": 1.0, "min_keys": keys, "max_keys": keys, "prefill_coverage": 0.98}


def engine_of(options: argparse.Namespace, clock: Clock, brownout: dict[str, Any]) -> Engine:
    """A running engine, by that clock."""
    config = ServiceConfig(
        device="cpu",
        kv_cache_gib=2.0,
        max_num_seqs=options.choices * options.requests,
        sparsity=budget(options),
        brownout=brownout,
    )
    engine_module.time = measures.time = clock
    engine = build_engine(config)
    engine.start()
    clock.follow(engine)
    return engine


def alone(options: argparse.Namespace, sparsity: SparsityParams) -> Answered:
    """One request with nothing beside it; the second, as the first one compiles."""
    clock = Clock()
    engine = engine_of(options, clock, {})

    async def ask() -> Answered:
        client = Client(engine, clock, options)
        await client.ask(clock.monotonic(), sparsity)
        return await client.ask(clock.monotonic(), sparsity)

    try:
        return asyncio.run(ask())
    finally:
        engine.stop()


def loaded(
    options: argparse.Namespace, sparsity: SparsityParams, interval: float, brownout: dict[str, Any]
) -> list[Answered]:
    """Requests that come every `interval` seconds."""
    clock = Clock()
    engine = engine_of(options, clock, brownout)

    async def ask() -> list[Answered]:
        client, start = Client(engine, clock, options), clock.monotonic()
        return await asyncio.gather(
            *(client.ask(start + n * interval, sparsity) for n in range(options.requests))
        )

    try:
        return asyncio.run(ask())
    finally:
        engine.stop()


def summary(found: list[Answered], interval: float, target: float) -> dict[str, float]:
    """Figures of one run; seconds, but for gaps, which are in milliseconds like their target."""
    gaps = sorted(gap * 1000 for one in found for gap in one.gaps)
    reports = [report for one in found for report in one.reports]
    ends = [n * interval + one.last for n, one in enumerate(found)]
    cut = sum(report.fallbacks.get("overload", 0) for report in reports)
    firsts = sorted(one.first for one in found)
    return {
        "requests": len(found),
        "good": sum(1000 * statistics.mean(one.gaps) <= target for one in found),
        "first_p50": statistics.median(firsts),
        "first_max": firsts[-1],
        "gap_mean_ms": statistics.mean(gaps),
        "gap_p50_ms": statistics.median(gaps),
        "gap_p99_ms": gaps[len(gaps) * 99 // 100],
        "seconds": max(ends),
        "tokens_per_s": (len(gaps) + len(reports)) / max(ends),
        "density": statistics.mean(report.density for report in reports),
        "keys": statistics.mean(report.keys_attended for report in reports),
        "coverage": statistics.mean(report.coverage or 0.0 for report in reports),
        "cut_tokens": cut,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-keys", type=int, default=8192)
    parser.add_argument("--overload", type=float, default=1.6)
    parser.add_argument("--slo", type=float, default=1.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wide = ServiceConfig(sparsity=budget(options)).sparsity.resolve()
    default = ServiceConfig().sparsity.resolve()
    ways = {
        "whole": wide,
        "default": default,
        "least": replace(wide, min_keys=SAMPLE, max_keys=SAMPLE),
        "pattern": replace(default, policy="fixed", prefill="dynamic"),
    }
    single = {name: alone(options, one) for name, one in ways.items()}
    whole = single["whole"]
    interval = whole.last / options.overload
    target = 1000 * options.slo * statistics.mean(whole.gaps)
    brownout = {
        "enabled": True,
        "itl_target_ms": target,
    }
    result: dict[str, Any] = {
        "command": " ".join(["python", "tests/bench/brownout.py", *sys.argv[1:]]),
        "machine": machine_name(torch.device("cpu")),
        "torch": torch.__version__,
        "alone_s": {name: one.last for name, one in single.items()},
        "gap_alone_ms": {name: 1000 * statistics.mean(one.gaps) for name, one in single.items()},
        "interval_s": interval,
        "target_ms": target,
        "runs": [],
    }
    print(json.dumps(result, indent=1), flush=True)
    for _ in range(options.repeats):
        for name, settings in (("off", {}), ("on", brownout)):
            run = summary(loaded(options, wide, interval, settings), interval, target)
            result["runs"].append({"brownout": name, **run})
            print(name, {key: round(value, 3) for key, value in run.items()}, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
