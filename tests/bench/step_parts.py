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
import statistics
import sys
import time
from contextlib import ExitStack
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

CELLS = "1x1024,1x128,4x1024,6x1024"


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


def main() -> None:
    """Measure and print."""
    given = _given()
    started, device = time.monotonic(), torch.device(given.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if gpu else "CPU"
    dtype = torch.bfloat16 if gpu else torch.float32
    config = shape_of(given.shape, given.layers)
    cells = [Cell(*(int(part) for part in cell.split("x"))) for cell in given.cells.split(",")]
    records: list[dict[str, Any]] = []
    late: list[str] = []
    with torch.inference_mode():
        decoder = dummy(config, dtype, device)
        caches = engine._filled_caches(config, max(c.batch * c.pages for c in cells), device, dtype)
        names = given.ways.split(";") if given.ways else list(WAYS)
        loaded = time.monotonic()
        share = (started + given.seconds - loaded) / len(cells)
        for number, cell in enumerate(cells):
            step = engine._step(cell, config.vocab_size, caches[0].kv.shape[1], device)
            captured: dict[str, CapturedStep] = {}
            logits: dict[str, Tensor] = {}
            # Most of the time goes by compiling.
            for name in names:
                if captured and time.monotonic() - loaded > share * (number + 0.6):
                    late.append(f"{cell.batch}x{cell.context} {name}")
                    continue
                with ExitStack() as stack:
                    for where, attribute, value in WAYS[name]:
                        stack.enter_context(patch.object(where, attribute, value))
                    way = CapturedStep(decoder, caches, Bucket(cell.batch, cell.pages, Dense()))
                    logits[name] = way.replay(step).logits.clone()
                    if gpu:
                        captured[name] = way
            turns: dict[str, list[float]] = {name: [] for name in captured}
            while captured and time.monotonic() - loaded < share * (number + 1):
                for name, way in captured.items():
                    turns[name].append(engine._seconds(way, step, given.steps, device) * 1e6)
            read = engine.step_bytes(decoder, cell, cell.context + 1.0, dynamic=False)
            for name in logits:
                record = _record(name, cell, turns.get(name, []), turns.get(names[0], []))
                bandwidth = bandwidth_of(machine)
                if bandwidth is not None and "us" in record:
                    record["ceiling_share"] = read / (bandwidth * 1e6) / record["us"]
                other = logits[names[0]]
                record["most_off"] = float((logits[name] - other).abs().max() / other.abs().max())
                records.append(record)
                print(json.dumps(record), file=sys.stderr, flush=True)
    head = {"machine": machine, "torch": torch.__version__, "triton": triton.__version__}
    head |= {"shape": given.shape, "layers": config.layers, "seconds": time.monotonic() - started}
    print(json.dumps({**head, "records": records, "no_time_for": late}, indent=1))


def _record(
    name: str, cell: Cell, turns: Sequence[float], first: Sequence[float]
) -> dict[str, Any]:
    record: dict[str, Any] = {"batch": cell.batch, "context": cell.context, "way": name}
    if turns:
        ratio = statistics.median(one / other for one, other in zip(turns, first, strict=True))
        record |= {"us": statistics.median(turns), "ratio": ratio, "turns": len(turns)}
    return record


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
    return parser.parse_args()


if __name__ == "__main__":
    main()
