"""The service's log: warnings and tracebacks, on the standard error of `saccade serve`.

Ray Serve takes a replica's standard error for itself, and drops what is below its own level: so a
replica writes a file of its own, and the process that started the cluster shows what is added.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "_SACCADE_LOGS"
"""Environment variable of a cluster's processes: where their files are; without it there are none.

Not a field's: a variable that begins with SACCADE_ would be refused as an unknown one.
"""
FORMAT = "%(asctime)s %(levelname)s %(message)s"
EVERY = 0.5
"""Seconds between two looks."""


def to_stderr() -> None:
    """Show this process's log."""
    _add(logging.StreamHandler())


def to_folder() -> None:
    """Write this process's log where `shown` looks, if anybody does."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        _add(logging.FileHandler(Path(folder) / f"{os.getpid()}.log", encoding="utf-8"))


@contextmanager
def shown(folder: Path) -> Iterator[None]:
    """Copy what other processes add to their files in `folder` to standard error."""
    ended = threading.Event()
    read: dict[Path, int] = {}

    def follow() -> None:
        while not ended.wait(EVERY):
            _show(folder, read)

    thread = threading.Thread(target=follow, name="saccade-logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _show(folder, read)


def _add(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger("saccade").addHandler(handler)


def _show(folder: Path, read: dict[Path, int]) -> None:
    """Copy whole lines; `read` are the bytes of each file that have been."""
    for file in sorted(folder.glob("*.log")):
        with file.open("rb") as added:
            added.seek(read.get(file, 0))
            lines, end, _ = added.read().rpartition(b"\n")
        if end:
            read[file] = read.get(file, 0) + len(lines) + 1
            print(lines.decode(errors="replace"), file=sys.stderr, flush=True)
