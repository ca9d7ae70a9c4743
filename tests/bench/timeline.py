"""When the kernels of one layer begin and end within a whole model's decode step, on a GPU.

python3 tests/bench/timeline.py [1x1024:dense 1x131072:dynamic ...]

The mean of the layers of a model in the shape of Llama 3.1 8B, from CUDA's own profiler. Kernels
begin before their input is there: what one adds is the time from the last one's end to its own.
"""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.decode_step import Bucket  # noqa: E402  (the script also runs uninstalled)
from models.graph import CapturedStep  # noqa: E402
from service.bench import engine  # noqa: E402
from service.bench.cell import Cell  # noqa: E402
from service.bench.shapes import shape_of  # noqa: E402

STEPS = ("1x1024:dense", "1x131072:dynamic", "6x131072:dynamic")
OPTIONS = engine.Options(keys=2048, repeats=1, steps=1, bandwidth=None)
MARK = "_gated_linear"
"""A kernel that each layer launches once."""


def main() -> None:
    """Measure and print."""
    device, config = torch.device("cuda"), shape_of("llama-3.1-8b", None)
    print(torch.cuda.get_device_name(device))
    kinds = [step.split(":") for step in sys.argv[1:] or STEPS]
    cells = [Cell(*(int(part) for part in cell.split("x"))) for cell, _ in kinds]
    with torch.inference_mode():
        decoder = engine.dummy(config, torch.bfloat16, device)
        pages = max(cell.batch * cell.pages for cell in cells)
        caches = engine._filled_caches(config, pages, device, torch.bfloat16)
        for cell, (name, kind) in zip(cells, kinds, strict=True):
            way = CapturedStep(decoder, caches, Bucket(cell.batch, cell.pages, kind == "dynamic"))
            step = engine._step(cell, OPTIONS.policy, config.vocab_size, pages, device)
            for _ in range(3):
                way.replay(step)
            torch.cuda.synchronize()
            with torch.profiler.profile() as profile:
                way.replay(step)
                torch.cuda.synchronize()
            _show(name, kind, profile)


def _show(name: str, kind: str, profile: torch.profiler.profile) -> None:
    """The whole step's time, and a layer's kernels."""
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    marks = [number for number, event in enumerate(events) if MARK in event.name]
    starts = [events[number].time_range.start for number in marks]
    layer = statistics.median(after - before for before, after in pairwise(starts))
    whole = events[-1].time_range.end - events[0].time_range.start
    print(f"{name} {kind}: {len(events)} kernels, {whole:.0f} us, {layer:.1f} us a layer")
    layers = [events[first - 1 : last] for first, last in pairwise(marks)]  # and the one before
    for kernels in zip(*map(pairwise, layers), strict=True):
        begins, adds = [], []
        for (before, event), first in zip(kernels, starts, strict=False):
            begins.append(event.time_range.start - first)
            adds.append(event.time_range.end - before.time_range.end)
        name = kernels[0][1].name[:32]
        begin, more = statistics.mean(begins), statistics.mean(adds)
        print(f"  {name:32} begins at {begin:6.1f}, adds {more:5.1f} us")


if __name__ == "__main__":
    main()
