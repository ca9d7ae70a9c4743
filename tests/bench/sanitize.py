"""Runs every Triton kernel under NVIDIA's compute-sanitizer, and notes what it found.

python3 tests/bench/sanitize.py [--commit HASH] [--output FILE]
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.envelope import as_json, current_commit, envelope  # noqa: E402  (runs uninstalled)

TOOLS = {
    "memcheck": "addresses outside of memory, or not aligned",
    "racecheck": "shared memory that is written while others read it",
    "synccheck": "barriers that not all reach",
}
EVERY = "from tests.kernels.compile_for_gpu import every; every('cuda')"


@dataclass(frozen=True, slots=True)
class Record:
    """What one tool found."""

    tool: str
    looks_for: str
    errors: int
    seconds: float


def main() -> None:
    """Run all tools, print and write; the exit status is 1 where one found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    # What is compiled here need not be compiled under each tool.
    subprocess.run([sys.executable, "-c", EVERY], cwd=ROOT, check=True)
    records = [_run(tool) for tool in tqdm(TOOLS, unit="tool")]
    for record in records:
        print(record)
    if given.output is not None:
        command = shlex.join(["python", *sys.argv])
        version = _output(["compute-sanitizer", "--version"]).strip().splitlines()[-1]
        head = envelope(
            command,
            given.commit or current_commit(),
            torch.cuda.get_device_name(),
            {"version": version},
        )
        given.output.write_text(as_json(head, records))
    sys.exit(any(record.errors for record in records))


def _run(tool: str) -> Record:
    """All kernels under one tool.

    Raises:
        RuntimeError: if the tool came to no end.
    """
    begin = time.perf_counter()
    output = _output(["compute-sanitizer", "--tool", tool, sys.executable, "-c", EVERY])
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if found is None:
        raise RuntimeError(f"{tool} came to no end:\n{output[-2000:]}")
    if int(found[1]):
        print(output[-4000:])
    return Record(tool, TOOLS[tool], int(found[1]), round(time.perf_counter() - begin, 1))


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
