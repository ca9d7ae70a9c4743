"""A service as a process of its own, on a free port of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from service.processes import descendants
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Service:
    """A running service."""

    url: str
    pid: int

    def cpu(self) -> float:
        """Seconds of CPU time so far, over all of its processes that still run."""
        ticks = 0
        for pid in (self.pid, *(one.pid for one in descendants(self.pid))):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(arguments: Callable[[int], list[str]], seconds: float) -> Iterator[Service]:
    """A service, stopped at the end.

    Args:
        arguments: Python's, for a port.
        seconds: that it has to start.

    Raises:
        SystemExit: it did not start.
    """
    port = free_port()
    paths = (str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *arguments(port)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the service did not start")
            time.sleep(0.2)
        yield Service(url, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def standalone(folder: Path, *options: str) -> Callable[[int], list[str]]:
    """Arguments of `saccade serve --standalone` on a checkpoint."""
    command = ["-m", "service.cli", "serve", str(folder), "--standalone"]
    return lambda port: [*command, "--port", str(port), *options]
