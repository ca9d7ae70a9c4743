"""The operations guide's walk-through, as it is written, from a fresh clone to a report and back.

    python tests/bench/operations.py            # three minutes at most on two cores
    python tests/bench/operations.py --fresh    # installs every package again, too

Runs the ```bash blocks of docs/operations.md's section "Walk-through" in one shell, in a clone of
this checkout's last commit, on free ports. Before the block that stops everything it looks at what
the guide promises: Prometheus scrapes the service and has data of it, the rules are loaded and
evaluate, the load test has left its figures and its report. Afterwards nothing may be left running.
Exits with 1 when something does not hold. Uncommitted changes play no part, but for the guide's own
text, which is taken from this checkout.

Without --fresh the clone's `.venv` sees this interpreter's packages, so that `make install` finds
all that is locked and installs but the clone itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.deploy.monitoring import (  # noqa: E402
    ask,
    program,
    rules_not_loaded,
    targets_down,
)
from tests.ports import free_port  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

GUIDE = ROOT / "docs" / "operations.md"
SECTION = "Walk-through"
LAST = "Stop"
"""The heading under which everything is stopped."""
SETTLE = 75
"""Seconds in which the slowest rules, evaluated every minute, must have been."""
PATIENCE = 1800
"""Seconds for all blocks; with --fresh most of it is the packages' download."""
FORGET = ("VIRTUAL_ENV", "VENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
"""Variables of the caller that a new user's shell does not have."""


def blocks(guide: str) -> list[tuple[str, str]]:
    """(heading, text) of each shell block of the walk-through, in order."""
    _, _, rest = guide.partition(f"\n## {SECTION}\n")
    section = re.split(r"\n## ", rest)[0]
    found, heading, block = [], SECTION, None
    for line in section.splitlines():
        if block is None and line.startswith("### "):
            heading = line.removeprefix("### ")
        elif block is None and line == "```bash":
            block = []
        elif block is not None and line == "```":
            found.append((heading, "\n".join(block)))
            block = None
        elif block is not None:
            block.append(line)
    return found


def script(found: list[tuple[str, str]], folder: Path) -> str:
    """The blocks as one script, which waits for `go` before the last."""
    if [heading for heading, _ in found].count(LAST) != 1 or found[-1][0] != LAST:
        raise SystemExit(f"{GUIDE.name}: the walk-through must end with one block under {LAST}")
    lines = ["set -euo pipefail"]
    for heading, block in found:
        if heading == LAST:
            lines += [
                f"touch '{folder}/reached'",
                f"until [ -e '{folder}/go' ]; do sleep 0.2; done",
            ]
        lines += [f"printf '\\n== %s\\n' '{heading}'", block]
    return "\n".join(lines) + "\n"


def lend_packages(environment: Path) -> None:
    """A virtual environment that sees this one's packages, though not what they name in turn.

    A plain line in a .pth file: `site` does not read the .pth files there, of which one names the
    checkout that this environment belongs to.
    """
    venv.create(environment, with_pip=True, symlinks=True)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")


@contextlib.contextmanager
def shell(text: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """bash runs `text` in a session of its own; what it leaves is ended with the block."""
    file = folder / "walk-through.sh"
    file.write_text(text)
    kept = {name: value for name, value in os.environ.items() if name not in FORGET}
    process = subprocess.Popen(
        ["bash", str(file)], cwd=folder, env=kept | variables, start_new_session=True
    )
    try:
        yield process
    finally:
        for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            for pid in left(process.pid, folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while left(process.pid, folder) and time.monotonic() < deadline:
                process.poll()
                time.sleep(0.2)
        process.wait()


def left(session: int, folder: Path) -> dict[int, str]:
    """Names of the processes that live in a session, or were started in the folder or for it.

    Ray's have sessions of their own, and write their titles over their environment.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            state, _, _, of_session = rest.split()[:4]
            here = (entry / "cwd").resolve().is_relative_to(folder)
            for_it = f"{folder}/".encode() in (entry / "environ").read_bytes()
            if state != "Z" and (int(of_session) == session or here or for_it):
                found[int(entry.name)] = name
    return found


def wait_for(file: Path, process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until the script has come so far."""
    while not file.exists():
        if process.poll() is not None:
            raise SystemExit(f"the walk-through ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit("the walk-through takes too long")
        time.sleep(0.2)


def problems(clone: Path, prometheus: str) -> list[str]:
    """What the guide promises and does not hold."""
    found = targets_down(prometheus) + rules_not_loaded(prometheus)
    report, page = clone / "build/monitor/load.json", clone / "build/monitor/load.html"
    if not report.exists() or not page.exists():
        return [*found, "the load test left no report"]
    (record,) = json.loads(report.read_text())["records"]
    if not record["succeeded"]:
        found.append(f"the load test measured nothing: {record}")
    if "<svg" not in page.read_text():
        found.append("the load test's page has no plot")
    answer = ask(prometheus, "query", query="sum(saccade_request_success_total)")
    counted = sum(float(one["value"][1]) for one in answer["result"])
    # The question before the load is one more.
    if counted < record["succeeded"] + 1:
        found.append(f"Prometheus counts {counted:g} requests of {record['completed']} and more")
    names = ask(prometheus, "label/__name__/values")
    if sum(name.startswith("saccade_") for name in names) < 20:
        found.append("Prometheus has hardly a series of the service")
    return found


def refuses(port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def main() -> int:
    """Walk; 0 when everything holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="install every package again")
    given = parser.parse_args()
    if program("prometheus") is None and shutil.which("dpkg-deb") is None:
        print("prometheus is missing, and this is no Debian: the walk-through is not tested")
        return 1 if os.environ.get("CI") else 0
    started = time.monotonic()
    service, prometheus = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="saccade-walk-") as name:
        folder = Path(name).resolve()
        text = script(blocks(GUIDE.read_text()), folder)
        clone = folder / "saccade"
        if not given.fresh:
            # Beside the clone, which git makes only where nothing is.
            lend_packages(folder / "venv")
            text = text.replace("\ncd saccade\n", f"\ncd saccade\nln -s '{folder}/venv' .venv\n")
        with shell(
            text,
            folder,
            REPOSITORY=str(ROOT),
            PORT=str(service),
            PROMETHEUS_PORT=str(prometheus),
        ) as process:
            end = started + PATIENCE
            wait_for(folder / "reached", process, end)
            deadline = time.monotonic() + SETTLE
            base = f"http://127.0.0.1:{prometheus}"
            while (found := problems(clone, base)) and time.monotonic() < deadline:
                time.sleep(3)
            (folder / "go").touch()
            if process.wait(max(1.0, end - time.monotonic())) != 0:
                found.append(f"the last block ended with status {process.returncode}")
            found += [f"{name} still runs" for name in left(process.pid, folder).values()]
            found += [
                f"port {port} is still open" for port in (service, prometheus) if not refuses(port)
            ]
    took = time.monotonic() - started
    print("\n".join(found) or f"the walk-through holds what it promises ({took:.0f} seconds)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
