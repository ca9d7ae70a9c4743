"""A load above what whole budgets bear, with brownout off and on: the bundled model on a CPU.

    python tests/bench/brownout.py --json out.json

A request is a document of `--tokens` random tokens and `--choices` answers to it, so that what
costs is decoding; the budget is a wide one, `--max-keys`. What one request takes alone is measured
first, with its whole budget and with the smallest; then requests come `--overload` times as fast as
whole budgets bear, off and on turn by turn. Good is a request whose first token comes within
`--slo` times what it takes alone. The last level, the fixed pattern, is left out unless `--fixed`:
at this model's lengths it reads more keys than the smallest budget does.
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


class Client:
    """Requests to one engine, each of a document of its own."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0

    async def ask(self, due: float, sparsity: SparsityParams) -> Answered:
        """One request, from `due` on."""
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        vocab, options = self.engine.config.vocab_size, self.options
        prompt = torch.randint(300, vocab, (options.tokens,), generator=self.generator)
        self.count += 1
        stream = self.engine.submit(
            prompt.tolist(),
            SamplingParams(max_tokens=options.new, temperature=0.0, ignore_eos=True),
            sparsity,
            n=options.choices,
            request_id=str(self.count),
        )
        found, came = Answered(), {}
        async for delta in stream:
            now = time.monotonic()
            found.first = found.first or now - due
            if delta.index in came:
                found.gaps.append(now - came[delta.index])
            came[delta.index] = now
            if delta.sparsity is not None:
                found.reports.append(delta.sparsity)
        found.last = time.monotonic() - due
        return found


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """What requests ask for: so many keys, however much mass fewer would carry."""
    keys = options.max_keys
    return {"coverage": 1.0, "min_keys": keys, "max_keys": keys, "prefill_coverage": 0.98}


def engine_of(options: argparse.Namespace, brownout: dict[str, Any]) -> Engine:
    """A running engine."""
    config = ServiceConfig(
        device="cpu",
        kv_cache_gib=1.0,
        max_num_seqs=options.choices,
        sparsity=budget(options),
        brownout=brownout,
    )
    engine = build_engine(config)
    engine.start()
    return engine


def alone(options: argparse.Namespace, sparsity: SparsityParams) -> Answered:
    """One request with nothing beside it; the second, as the first one compiles."""
    engine = engine_of(options, {})

    async def ask() -> Answered:
        client = Client(engine, options)
        await client.ask(time.monotonic(), sparsity)
        return await client.ask(time.monotonic(), sparsity)

    try:
        return asyncio.run(ask())
    finally:
        engine.stop()


def loaded(
    options: argparse.Namespace, sparsity: SparsityParams, interval: float, brownout: dict[str, Any]
) -> list[Answered]:
    """Requests that come every `interval` seconds."""
    engine = engine_of(options, brownout)

    async def ask() -> list[Answered]:
        client, start = Client(engine, options), time.monotonic() + 0.1
        return await asyncio.gather(
            *(client.ask(start + n * interval, sparsity) for n in range(options.requests))
        )

    try:
        return asyncio.run(ask())
    finally:
        engine.stop()


def summary(found: list[Answered], interval: float, slo: float) -> dict[str, float]:
    """Figures of one run; seconds, but for gaps, which are in milliseconds."""
    gaps = sorted(gap * 1000 for one in found for gap in one.gaps)
    reports = [report for one in found for report in one.reports]
    ends = [n * interval + one.last for n, one in enumerate(found)]
    cut = sum(report.fallbacks.get("overload", 0) for report in reports)
    firsts = sorted(one.first for one in found)
    return {
        "requests": len(found),
        "good": sum(one.first <= slo for one in found),
        "first_p50": statistics.median(firsts),
        "first_last": found[-1].first,
        "first_max": firsts[-1],
        "gap_mean_ms": statistics.mean(gaps),
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
    parser.add_argument("--choices", type=int, default=16)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-keys", type=int, default=8192)
    parser.add_argument("--overload", type=float, default=1.2)
    parser.add_argument("--slo", type=float, default=3.0)
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wide = ServiceConfig(sparsity=budget(options)).sparsity.resolve()
    whole, least = (
        alone(options, one) for one in (wide, replace(wide, min_keys=SAMPLE, max_keys=SAMPLE))
    )
    interval, slo = whole.last / options.overload, options.slo * whole.first
    brownout = {
        "enabled": True,
        "fixed": options.fixed,
        "max_wait_s": whole.first,
        "itl_target_ms": 2000 * statistics.mean(whole.gaps),
    }
    result: dict[str, Any] = {
        "command": " ".join(["python", "tests/bench/brownout.py", *sys.argv[1:]]),
        "machine": machine_name(torch.device("cpu")),
        "torch": torch.__version__,
        "alone_s": {"whole": whole.last, "least": least.last},
        "first_alone_s": whole.first,
        "interval_s": interval,
        "slo_s": slo,
        "runs": [],
    }
    print(
        f"alone: {whole.last:.1f} s with {options.max_keys} keys, {least.last:.1f} s with "
        f"{SAMPLE}; one request every {interval:.1f} s, good within {slo:.1f} s",
        flush=True,
    )
    for _ in range(options.repeats):
        for name, settings in (("off", {}), ("on", brownout)):
            run = summary(loaded(options, wide, interval, settings), interval, slo)
            result["runs"].append({"brownout": name, **run})
            print(name, {key: round(value, 3) for key, value in run.items()}, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
