"""Runs the tests of Triton's kernels on a GPU and notes how they went.

python3 tests/bench/gpu_tests.py [--commit HASH] [--output FILE] [--workers 14]

Without a GPU the same tests run in Triton's interpreter, with all others.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.envelope import as_json, current_commit, envelope  # noqa: E402  (runs uninstalled)

FILES = (
    "tests/kernels/test_dense_decode.py",
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_gpu_alibi.py",
    "tests/kernels/test_layer.py",
    "tests/kernels/test_prefill.py",
    "tests/models/test_graph.py",
    "tests/service/engine/test_faults.py",
    "tests/service/engine/test_replay.py",
)


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one file's tests."""

    file: str
    passed: int
    failed: int
    skipped: int
    seconds: float  # of all tests, added up


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=14)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *FILES, f"--numprocesses={given.workers}"]
        options = ["--dist=worksteal", "-p", "no:cacheprovider", f"--junitxml={report}"]
        status = subprocess.run([*command, *options], cwd=ROOT, check=False).returncode
        records = _records(report)
    for record in records:
        print(record)
    if given.output is not None:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        line = shlex.join(["python", *sys.argv])
        head = envelope(line, given.commit or current_commit(), machine, {"status": status})
        given.output.write_text(as_json(head, records))
    sys.exit(status)


def _records(report: Path) -> list[Record]:
    """Outcomes by file, from pytest's report."""
    outcomes: dict[str, Counter[str]] = {file: Counter() for file in FILES}
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped"
        outcomes[file][outcome if tags & {"failure", "error", "skipped"} else "passed"] += 1
        seconds[file] += float(case.get("time", 0))
    return [
        Record(file, n["passed"], n["failed"], n["skipped"], round(seconds[file], 1))
        for file, n in outcomes.items()
    ]


if __name__ == "__main__":
    main()
