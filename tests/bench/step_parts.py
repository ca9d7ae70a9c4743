"""A model's decode step, and the same with one part of it done otherwise: what each part is worth.

python3 tests/bench/step_parts.py [--cells 1x1024,...] [--ways "step;apart;..."] [--seconds 55]

Ways are captured as CUDA graphs and replayed turn by turn, so that the machine's mood hits all
alike. Prints JSON: of each way and cell the median time, and its ratio to the way `step`, which is
the step as it is. `apart` is the step with every launch of its own that has been folded into
another: norms, sums, logits, and attention outside the chain of overlapping kernels. What no time
is left for is named. With `--layers 1 --device cpu --shape tiny` it is a trial under Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.gpu import (  # noqa: E402  (the script also runs uninstalled)
    attend,
    dense_step,
    linear,
    overlap,
    stream,
)
from kernels.gpu.rotate import rotate_and_write  # noqa: E402
from kernels.policy import Dense  # noqa: E402
from models import decode  # noqa: E402
from models.decode_step import Bucket  # noqa: E402
from models.graph import CapturedStep  # noqa: E402
from models.loader import dummy  # noqa: E402
from service.bench import engine  # noqa: E402
from service.bench.cell import Cell, bandwidth_of  # noqa: E402
from service.bench.shapes import shape_of  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from kernels.cache import LayerCache
    from models.config import ModelConfig
    from models.decode_step import DecodeStep
    from models.decoder import Decoder

CELLS = "1x1024,1x128,4x1024,6x1024"
LONGEST = 120.0
"""Seconds that compiling may take."""


class Apart(stream.Stream):
    """A launch between two products, which adds and takes the norm."""

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._update = linear.linear(x, weight, bias)


class ApartToTheEnd(Apart):
    """And several that ask whether a row is finite."""

    def normed(self, norm: tuple[Tensor, float], finite: Tensor | None = None) -> Tensor:
        normed = super().normed(norm)
        if finite is not None:
            finite.copy_(normed.isfinite().all(-1))
        return normed


def logits_apart(x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    """The product in its own dtype, and a copy."""
    return output.copy_(linear.linear(x, weight))


def rotation_apart(qkv: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Three launches: rotating and writing, attention, and the parts' join."""
    angles, slots, cache, rows, _, scale, norms, eps = given
    query = rotate_and_write(qkv, angles, slots, cache, norms, eps)
    return attend.dense_decode(query, cache, rows, scale)


def attention_outside(qkv: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """And the last two begin when all before them has ended, as does what comes behind them."""
    angles, slots, cache, rows, _, scale, norms, eps = given
    query = rotate_and_write(qkv, angles, slots, cache, norms, eps)
    with patch.object(overlap, "possible", lambda device: False):
        return attend.dense_decode(query, cache, rows, scale)


def fetching(size: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Products that add to the residual stream, the first of which waits for attention."""

    def add_linear(*given: Any) -> tuple[Tensor, Tensor]:
        with patch.object(linear, "FETCHED", size):
            return linear.add_linear(*given)

    return add_linear


WAYS: dict[str, list[tuple[object, str, object]]] = {
    "step": [],
    "apart": [
        (decode, "Stream", ApartToTheEnd),
        (decode, "linear", logits_apart),
        (decode, "rotate_and_attend", attention_outside),
        (attend, "ALONE", 1),
    ],
    "norms apart": [(decode, "Stream", Apart)],
    "attention outside": [(decode, "rotate_and_attend", attention_outside)],
    "rotation apart": [(decode, "rotate_and_attend", rotation_apart)],
    "joined by a launch": [(dense_step, "JOINED", 0)],
    "keys alone": [(attend, "ALONE", 1 << 20)],
    "keys never alone": [(attend, "ALONE", 1)],
    "keys in 64s": [(attend, "RUN_BYTES", 64 * 256), (dense_step, "JOINED", 32)],
    "keys in 64s, joined by a launch": [
        (attend, "RUN_BYTES", 64 * 256),
        (dense_step, "JOINED", 0),
    ],
    "keys in 32s, joined by a launch": [
        (attend, "RUN_BYTES", 32 * 256),
        (dense_step, "JOINED", 0),
    ],
    "fetch 1K": [(linear, "FETCHED", 1024)],
    "fetch 4K": [(linear, "FETCHED", 4096)],
    "fetch 8K": [(linear, "FETCHED", 8192)],
    "sums fetch 4K": [(stream, "add_linear", fetching(4096))],
    "sums fetch 8K": [(stream, "add_linear", fetching(8192))],
    "stages 4": [(linear, "STAGES", 4)],
    "stages 6": [(linear, "STAGES", 6)],
    "logits apart": [(decode, "linear", logits_apart)],
}
"""What is replaced for each way: of an object an attribute, by a value."""


@dataclass(slots=True)
class Bench:
    """A model of random weights and its caches, and what has been measured of them."""

    decoder: Decoder
    caches: list[LayerCache]
    device: torch.device
    steps: int
    records: list[dict[str, Any]] = field(default_factory=list)
    late: list[str] = field(default_factory=list)  # what there was no time for

    @staticmethod
    def of(config: ModelConfig, cells: Sequence[Cell], device: torch.device, steps: int) -> Bench:
        """For all cells."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pages = max(cell.batch * cell.pages for cell in cells)
        caches = engine._filled_caches(config, pages, device, dtype)
        return Bench(dummy(config, dtype, device), caches, device, steps)

    def capture(self, name: str, cell: Cell, step: DecodeStep) -> tuple[CapturedStep, Tensor]:
        """A way's step, and the logits of its first replay: a CPU has no other like it."""
        with ExitStack() as stack:
            for where, attribute, value in WAYS[name]:
                stack.enter_context(patch.object(where, attribute, value))
            bucket = Bucket(cell.batch, cell.pages, Dense())
            way = CapturedStep(self.decoder, self.caches, bucket)
            return way, way.replay(step).logits.clone()

    def measure(self, names: Sequence[str], cell: Cell, seconds: float) -> None:
        """One cell: most of the time goes by capturing, the rest by turns."""
        begun, step = time.monotonic(), self.step(cell)
        captured: dict[str, tuple[CapturedStep, Tensor]] = {}
        for name in names:
            if captured and time.monotonic() - begun > 0.6 * seconds:
                self.late.append(f"{cell.batch}x{cell.context} {name}")
                continue
            captured[name] = self.capture(name, cell, step)
        turns: dict[str, list[float]] = {name: [] for name in captured}
        while self.device.type == "cuda":
            for name, (way, _) in captured.items():
                turns[name].append(engine._seconds(way, step, self.steps, self.device) * 1e6)
            if time.monotonic() - begun > seconds:
                break
        read = engine.step_bytes(self.decoder, cell, cell.context + 1.0, dynamic=False)
        first, (_, expected) = turns[names[0]], captured[names[0]]
        self.records.append(
            {
                "cell": f"{cell.batch}x{cell.context}",
                "bytes": read,
                "turns": len(first),
                "ways": {
                    name: _record(turns[name], first, read, self.bandwidth)
                    | {"off": _off(logits, expected)}
                    for name, (_, logits) in captured.items()
                },
            }
        )

    @property
    def bandwidth(self) -> float | None:
        """Terabytes a second, where that is known."""
        gpu = self.device.type == "cuda"
        return bandwidth_of(torch.cuda.get_device_name(self.device)) if gpu else None

    def step(self, cell: Cell) -> DecodeStep:
        """A cell's input."""
        pages, vocab_size = self.caches[0].kv.shape[1], self.decoder.config.vocab_size
        return engine._step(cell, vocab_size, pages, self.device)


def _record(
    turns: Sequence[float], first: Sequence[float], read: int, bandwidth: float | None
) -> dict[str, float]:
    """Microseconds, the ratio to the first way's, and the share of the read limit."""
    if not turns:
        return {}
    us = statistics.median(turns)
    ratio = statistics.median(one / other for one, other in zip(turns, first, strict=True))
    share = {} if bandwidth is None else {"share": round(read / (bandwidth * 1e6) / us, 4)}
    return {"us": round(us, 1), "ratio": round(ratio, 4), **share}


def _off(logits: Tensor, expected: Tensor) -> float:
    """The most that logits differ, as a share of the greatest."""
    return round(float((logits - expected).abs().max() / expected.abs().max()), 6)


def compile_ways(names: Sequence[str]) -> list[str]:
    """Have each way's kernels in Triton's cache, by processes of their own: the ways that run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--compile", "--ways"]
    running = [subprocess.Popen([*command, name]) for name in names]
    deadline, runs = time.monotonic() + LONGEST, []
    for name, process in zip(names, running, strict=True):
        try:
            if process.wait(max(0.0, deadline - time.monotonic())) == 0:
                runs.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return runs


def main() -> None:
    """Measure and print."""
    given = _given()
    begun, device = time.monotonic(), torch.device(given.device)
    cells = [Cell(*(int(part) for part in cell.split("x"))) for cell in given.cells.split(",")]
    names = given.ways.split(";") if given.ways else list(WAYS)
    config = shape_of(given.shape, 1 if given.compile else given.layers)
    with torch.inference_mode():
        if given.compile:
            bench = Bench.of(replace(config, tied=True), cells, device, given.steps)
            for cell in cells:
                for name in names:
                    bench.capture(name, cell, bench.step(cell))
            return
        runs = compile_ways(names) if device.type == "cuda" else names
        compiled = time.monotonic()
        if not runs:
            sys.exit("step_parts: no way runs; what is written above says why")
        bench = Bench.of(config, cells, device, given.steps)
        for left in range(len(cells), 0, -1):
            share = (begun + given.seconds - time.monotonic()) / left
            bench.measure(runs, cells[-left], share)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    head = {"machine": machine, "torch": torch.__version__, "triton": triton.__version__}
    head |= {"shape": given.shape, "layers": config.layers, "steps": given.steps}
    head |= {"seconds": time.monotonic() - begun, "seconds_of_compiling": compiled - begun}
    head |= {"failed": [name for name in names if name not in runs], "no_time_for": bench.late}
    text = json.dumps({**head, "records": bench.records}, indent=1)
    # A way a line.
    print(re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text))


def _given() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=CELLS, help="batch x keys in the cache, a list")
    parser.add_argument("--ways", help="a;b;...; all by default, the first being compared with")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=8, help="in a row, a turn")
    parser.add_argument("--seconds", type=float, default=55.0, help="to end after, about")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="no more than that")
    return parser.parse_args()


if __name__ == "__main__":
    main()
