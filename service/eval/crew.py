"""Processes that work for an evaluation: one task at a time, through a pipe of their own each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from tqdm import tqdm

from kernels.errors import SaccadeError
from service.errors import GenerationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from types import TracebackType

Task = TypeVar("Task")
Found = TypeVar("Found")

GOODBYE = 10.0
"""Seconds that a process with nothing left to do has to end by itself."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a process stopped; text alone, since an exception may not survive the way."""

    message: str
    expected: bool  # one sentence for the user


class Crew(Generic[Task, Found]):
    """Processes that each take a task, and give back what they found, until the crew is left.

    One that dies closes its pipe, also in the middle of a message, and blocks nobody; the crew's
    owner hears of it. One whose owner dies finds its pipe closed, and ends.

    Args:
        name: what a process is called in errors, such as "worker".
        makes: of each process what it does: called once there, gives a function of a task.

    Attributes:
        idle: pipes of the processes that wait for a task.
        busy: pipes of the others, which will have something to say; with what they do, None while
            they prepare.
    """

    def __init__(self, name: str, makes: Sequence[Callable[[], Callable[[Task], Found]]]) -> None:
        self._name = name
        self._makes = makes
        self._processes: dict[Connection, SpawnProcess] = {}
        self.idle: list[Connection] = []
        self.busy: dict[Connection, Task | None] = {}

    def __enter__(self) -> Crew[Task, Found]:
        # Fresh interpreters: what a copy of this one holds (threads, a GPU) would not work there.
        context = multiprocessing.get_context("spawn")
        for make in self._makes:
            ours, theirs = context.Pipe()
            process = context.Process(target=_live, args=(make, theirs), daemon=True)
            with _quiet():
                process.start()
            theirs.close()
            self._processes[ours] = process
            self.busy[ours] = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for ours in self._processes:
            ours.close()
        for process in self._processes.values():
            if kind is None:
                process.join(GOODBYE)
            process.terminate()
        for process in self._processes.values():
            process.join(GOODBYE)
            process.kill()
            process.join()

    def give(self, task: Task) -> None:
        """A task for one of the idle.

        Raises:
            GenerationError: that one is dead.
        """
        pipe = self.idle.pop()
        self.busy[pipe] = task
        try:
            pipe.send(task)
        except OSError:
            self._died(pipe)

    def hear(self, pipe: Connection) -> tuple[Task, Found] | None:
        """What a busy one has to say: what it found, or nothing but that it is ready.

        Raises:
            GenerationError: it failed on something for the user to change, or died.
            RuntimeError: it failed on what is a mistake in the program; has its traceback.
        """
        try:
            said: Found | _Failure | None = pipe.recv()
        except (EOFError, OSError):
            self._died(pipe)
        if isinstance(said, _Failure):
            raise (GenerationError if said.expected else RuntimeError)(said.message)
        task = self.busy.pop(pipe)
        self.idle.append(pipe)
        if task is None or said is None:
            return None
        return task, said

    def _died(self, pipe: Connection) -> NoReturn:
        process = self._processes[pipe]
        process.join(GOODBYE)
        raise GenerationError(
            f"a {self._name} of the evaluation died (exit code {process.exitcode}); with fewer "
            f"--{self._name}s each has more memory"
        ) from None


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


def _live(make: Callable[[], Callable[[Task], Found]], pipe: Connection) -> None:
    """A process's life: do what comes through the pipe until nothing can come any more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Its default is a lock between processes, which would outlive one that is stopped.
    tqdm.set_lock(threading.RLock())
    do = _tried(make)
    said: object = do if isinstance(do, _Failure) else None
    # The owner may be gone in the middle of a task: then nobody is to hear of it.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(said)
        while not isinstance(do, _Failure) and not isinstance(said, _Failure):
            said = _tried(partial(do, pipe.recv()))
            pipe.send(said)


def _tried(work: Callable[[], Found]) -> Found | _Failure:
    """What comes of some work, whatever it is: the owner must hear of it."""
    try:
        return work()
    except SaccadeError as error:
        return _Failure(str(error), expected=True)
    except Exception:  # noqa: BLE001  see above
        return _Failure(f"a process failed:\n{traceback.format_exc()}", expected=False)
