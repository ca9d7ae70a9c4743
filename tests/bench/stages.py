"""What each stage of one layer's dynamic attention adds to its time, on a GPU.

python3 tests/bench/stages.py [8x131072 1x1048576 ...]

The stages' kernels overlap, so that none has a time of its own. The first one, the first two and so
on are captured into a CUDA graph each, and timed turn by turn; what one adds is the difference.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.gpu import decode as attention  # noqa: E402  (the script also runs uninstalled)
from service.bench import decode  # noqa: E402
from service.bench.cell import Cell  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

CELLS = ("1x131072", "1x1048576", "8x131072", "32x32768")
STAGES = ("prepare", "probe", "settle", "scan", "look", "_united")
OPTIONS = decode.Options(keys=2048, repeats=20, bandwidth=None)


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    for cell in sys.argv[1:] or CELLS:
        size = Cell(*(int(part) for part in cell.split("x")))
        with torch.inference_mode():
            bench = decode._Bench(size, device, torch.bfloat16, decode.Shape(), OPTIONS)
            ways = [_first(bench, number) for number in range(1, len(STAGES) + 1)]
            turns = [[way() for way in ways] for _ in range(OPTIONS.repeats)]
        times = [0.0, *(statistics.median(column) for column in zip(*turns, strict=True))]
        added = [after - before for before, after in pairwise(times)]
        parts = (f"{stage.strip('_')} {us:.1f}" for stage, us in zip(STAGES, added, strict=True))
        print(f"{cell}: {times[-1]:.1f} us:", ", ".join(parts), flush=True)
        del bench, ways
        torch.cuda.empty_cache()


def _first(bench: decode._Bench, number: int) -> Callable[[], float]:
    """What times so many stages once: microseconds."""
    with ExitStack() as left_out:
        for stage in STAGES[number:]:
            left_out.enter_context(mock.patch.object(attention, stage, lambda *_, **__: None))
        return bench._timed(bench._dynamic, bench.sets)


if __name__ == "__main__":
    main()
