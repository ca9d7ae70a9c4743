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
from tests.kernels.compile_for_gpu import JOBS  # noqa: E402

TOOLS = {
    "memcheck": "addresses outside of memory, or not aligned",
    "racecheck": "shared memory that is written while others read it",
    "synccheck": "barriers that not all reach",
}
LIMIT = 600
"""Seconds after which a job is ended: compiling takes minutes, a tool half of one."""
JOB = "from tests.kernels.compile_for_gpu import JOBS; JOBS[{}](device='cuda')"


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
    jobs = [[sys.executable, "-c", JOB.format(number)] for number in range(len(JOBS))]
    _outputs(jobs)  # what is compiled here need not be compiled under each tool
    records = []
    for tool in tqdm(TOOLS, unit="tool"):
        records.append(_run(tool, jobs))
        print(records[-1], flush=True)
    if given.output is not None:
        command = shlex.join(["python", *sys.argv])
        version = _outputs([["compute-sanitizer", "--version"]])[0].strip().splitlines()[-1]
        head = envelope(
            command,
            given.commit or current_commit(),
            torch.cuda.get_device_name(),
            {"version": version},
        )
        given.output.write_text(as_json(head, records))
    sys.exit(any(record.errors for record in records))


def _run(tool: str, jobs: list[list[str]]) -> Record:
    """All jobs under one tool.

    Raises:
        RuntimeError: if it came to no end.
    """
    begin, errors = time.perf_counter(), 0
    for output in _outputs([["compute-sanitizer", "--tool", tool, *job] for job in jobs]):
        found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
        if found is None:
            raise RuntimeError(f"{tool} came to no end:\n{output[-2000:]}")
        errors += int(found[1])
        if int(found[1]):
            print(output[-4000:])
    return Record(tool, TOOLS[tool], errors, round(time.perf_counter() - begin, 1))


def _outputs(commands: list[list[str]]) -> list[str]:
    """What commands print that run at once.

    Raises:
        RuntimeError: if one fails, or comes to no end (timeout's status 124).
    """
    running = [
        subprocess.Popen(
            ["timeout", str(LIMIT), *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    outputs = [each.communicate()[0] for each in running]
    for each, output in zip(running, outputs, strict=True):
        if each.returncode:
            raise RuntimeError(
                f"{shlex.join(each.args)} ended with {each.returncode}:\n{output[-2000:]}"
            )
    return outputs


if __name__ == "__main__":
    main()
