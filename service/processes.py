"""A process's descendants, so that none outlives it; Linux alone, elsewhere there are none."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process; its start tells it from a later one with the same id."""

    pid: int
    start: int  # clock ticks since boot


def descendants(pid: int | None = None) -> set[Process]:
    """Children of a process, this one by default, their children, and so on."""
    parents: dict[Process, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        found = _read(int(folder.name))
        if found is not None:
            parents[found[0]] = found[1]
    family = {os.getpid() if pid is None else pid}
    below: set[Process] = set()
    while new := {one for one, parent in parents.items() if parent in family} - below:
        below |= new
        family |= {one.pid for one in new}
    return below


def end(processes: set[Process], patience: float) -> None:
    """Wait until `processes` have ended; kill those that have not after `patience` seconds."""
    deadline = time.monotonic() + patience
    while alive := {one for one in processes if _runs(one)}:
        if time.monotonic() > deadline:
            for one in alive:
                # Killing one may have ended the next.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _runs(process: Process) -> bool:
    found = _read(process.pid)
    return found is not None and found[0] == process and found[2] != "Z"


def _read(pid: int) -> tuple[Process, int, str] | None:
    """The process with this id, its parent's id and its state."""
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(fields[19])), int(fields[1]), fields[0]
