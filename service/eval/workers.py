"""Spreads documents over processes, each with a model of its own.

A small model keeps a device busy for a fraction of a step, and the rest is this machine's own work:
several processes share a device well.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from kernels.errors import SaccadeError
from models.loader import load
from models.tokenizer import Tokenizer
from service.errors import GenerationError
from service.eval.measure import Examiner, Item, Plan
from service.eval.session import Session
from service.eval.source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from service.eval.record import DocumentScore

TOGETHER = 16
"""Questions of a document that are answered at once."""
POLL = 1.0
"""Seconds between a worker's looks at whether its parent still lives."""
GOODBYE = 10.0
"""Seconds that a worker with nothing left to do has to end by itself."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process needs to examine a model.

    Attributes:
        model: checkpoint folder.
        dtype, load_format: as in the configuration.
        texts: the user's own; empty for generated prose.
        tokens: of the longest context.
    """

    model: Path
    dtype: str
    load_format: Literal["safetensors", "dummy"]
    texts: tuple[str, ...]
    tokens: int
    plan: Plan

    def examiner(self, device: torch.device) -> Examiner:
        """Load the model.

        Raises:
            ModelError: the checkpoint cannot be loaded, or holds no such context.
        """
        tokenizer = Tokenizer.from_folder(self.model)
        decoder, shape = load(self.model, self.dtype, device, self.load_format)
        session = Session(decoder, shape, tokenizer, tokens=self.tokens, together=TOGETHER)
        source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False), self.texts)
        return Examiner(session, tokenizer, source, self.plan)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a worker stopped; text alone, since an exception may not survive the way."""

    message: str
    expected: bool  # one sentence for the user


_Finding = tuple[Item, "list[DocumentScore]"]


def examine(
    setup: Setup, items: Sequence[Item], device: torch.device, workers: int = 1
) -> Iterator[_Finding]:
    """The scores of every item, in the order in which they come.

    Args:
        setup: what to run.
        items: what on.
        device: with several workers "cuda" is every visible GPU in turn.
        workers: processes; one works in this process.

    Raises:
        SaccadeError: an item failed, or a worker died.
        RuntimeError: a worker failed on what is a mistake in the program; has its traceback.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        examiner = setup.examiner(device)
        yield from ((item, examiner.measure(item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    waiting: multiprocessing.Queue[Item | None] = context.Queue()
    for item in [*items, *[None] * workers]:
        waiting.put(item)
    # A pipe each: a worker that dies in the middle of a message closes it, and blocks nobody.
    listening: dict[Connection, SpawnProcess] = {}
    try:
        for one in _devices(device, workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(setup, one, waiting, theirs), daemon=True)
            listening[ours] = process
            with _quiet():
                process.start()
            theirs.close()
        yield from _findings(dict(listening), len(items))
        for process in listening.values():
            process.join(GOODBYE)
    finally:
        for process in listening.values():
            if process.pid is not None:
                process.terminate()
                process.join()
        # What nobody will take must not keep this process from ending.
        waiting.cancel_join_thread()


def _devices(device: torch.device, workers: int) -> list[torch.device]:
    """One for each worker; a GPU by number is all there is."""
    if device.type != "cuda" or device.index is not None:
        return [device] * workers
    count = torch.cuda.device_count()
    return [torch.device("cuda", number % count) for number in range(workers)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Processes started here draw no progress bars: the parent's is the one to watch."""
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _findings(listening: dict[Connection, SpawnProcess], count: int) -> Iterator[_Finding]:
    """`count` findings, from whichever worker has one."""
    while count:
        if not listening:
            raise GenerationError("the workers of the evaluation ended before their work")
        for ready in wait(list(listening)):
            assert isinstance(ready, Connection)
            try:
                one: _Finding | _Failure = ready.recv()
            except (EOFError, OSError):
                process = listening.pop(ready)
                process.join()
                if process.exitcode:
                    raise GenerationError(
                        f"a worker of the evaluation died (exit code {process.exitcode}); with "
                        "fewer --workers each has more memory"
                    ) from None
                continue
            if isinstance(one, _Failure):
                raise (GenerationError if one.expected else RuntimeError)(one.message)
            count -= 1
            yield one


def _work(
    setup: Setup,
    device: torch.device,
    waiting: multiprocessing.Queue[Item | None],
    found: Connection,
) -> None:
    """A worker's life: take items until there are none, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    # Its default is a lock between processes, which would outlive a worker that is stopped.
    tqdm.set_lock(threading.RLock())
    parent = multiprocessing.parent_process()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        examiner = setup.examiner(device)
        while parent is not None and parent.is_alive():
            try:
                item = waiting.get(timeout=POLL)
            except queue.Empty:
                continue
            if item is None:
                return
            found.send((item, examiner.measure(item)))
    except SaccadeError as error:
        found.send(_Failure(str(error), expected=True))
    except Exception:  # noqa: BLE001  whatever it is, the parent must hear of it
        found.send(_Failure(f"a worker failed:\n{traceback.format_exc()}", expected=False))
