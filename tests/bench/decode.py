"""One layer's decode attention on a GPU against its peers: the table of results.

python3 tests/bench/decode.py [--commit HASH] [--output FILE] [--flex] [--cells 1x131072,...]

The same as `saccade bench decode`, where the service's packages are not installed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.bench import decode  # noqa: E402  (the script also runs uninstalled)
from service.bench.cell import Cell, bandwidth_of  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402

CELLS = "1x128,1x1024,1x4096,1x8192,1x16384,1x32768,1x131072,1x1048576,8x32768,8x131072,32x32768"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--flex", action="store_true", help="also FlexAttention")
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--keys", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device = torch.device(given.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    bandwidth = bandwidth_of(machine)
    cells = [Cell(*(int(part) for part in cell.split("x"))) for cell in given.cells.split(",")]
    options = decode.Options(given.keys, given.repeats, bandwidth, given.flex)
    records = decode.measure(cells, device, torch.bfloat16, decode.Shape(), options)
    print(decode.table(records))
    if given.output is None:
        return
    settings = {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "keys": given.keys,
        "repeats": given.repeats,
        "bandwidth_tb_s": bandwidth,
        "selection": options.selection(),
    }
    command = shlex.join(["python", *sys.argv])
    head = envelope(command, given.commit or current_commit(), machine, settings)
    given.output.write_text(as_json(head, records))


if __name__ == "__main__":
    main()
