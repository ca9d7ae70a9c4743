"""A whole model's decode steps on a GPU, dynamic against dense: the table of results.

python3 tests/bench/engine.py [--commit HASH] [--output FILE] [--cells 1x1024,1x131072,...]

The same as `saccade bench engine`, where the service's packages are not installed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.bench import engine  # noqa: E402  (the script also runs uninstalled)
from service.bench.cell import Cell, bandwidth_of  # noqa: E402
from service.bench.shapes import shape_of  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402

CELLS = "1x1024,1x8192,1x16384,16x8192,16x16384,1x32768,1x131072,4x131072,6x131072"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--keys", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    device = torch.device("cuda")
    machine = torch.cuda.get_device_name(device)
    bandwidth = bandwidth_of(machine)
    cells = [Cell(*(int(part) for part in cell.split("x"))) for cell in given.cells.split(",")]
    options = engine.Options(given.keys, given.repeats, given.steps, bandwidth)
    config = shape_of(given.shape, given.layers)
    records, skipped = engine.measure(config, cells, device, torch.bfloat16, options)
    print(engine.table(records, skipped))
    if given.output is None:
        return
    settings = {
        "shape": given.shape,
        "layers": config.layers,
        "dtype": "bfloat16",
        "keys": given.keys,
        "repeats": given.repeats,
        "steps": given.steps,
        "bandwidth_tb_s": bandwidth,
        "selection": options.selection(),
    }
    command = shlex.join(["python", *sys.argv])
    head = envelope(command, given.commit or current_commit(), machine, settings)
    given.output.write_text(as_json(head | {"skipped": skipped}, records))


if __name__ == "__main__":
    main()
