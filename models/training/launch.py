"""Starts one training process a GPU, and ends all of them when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.errors import SaccadeError
from models.training.errors import TrainingError
from models.training.parent import end_with_parent
from models.training.ranks import Ranks
from models.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.context import SpawnProcess

    from models.training.plans import Plan
    from models.training.prepare import Data
    from models.training.run import Settings


def train_together(world: int, plan: Plan, data: Data, settings: Settings, *, seed: int) -> None:
    """Runs one piece in `world` processes, on a GPU each or all on the CPU.

    SIGINT and SIGTERM are passed on: all processes stop at the same step and the first one saves.

    Raises:
        TrainingError: a process failed; its own message stands on the standard error.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_train,
            args=(rank, world, data.folder / "ranks", plan, data, settings, seed),
            name=f"rank {rank}",
        )
        for rank in range(world)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for process in processes:
            process.start()
        failed = _first_failure(processes)
    finally:
        for process in processes:
            if process.pid is not None:
                # Not terminate(): a process that waits for a lost one would only note the wish.
                process.kill()
                process.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is not None:
        raise TrainingError(
            f"Training process {failed.name!r} of {world} ended with exit code {failed.exitcode}: "
            "see its output above; the last saved state is intact."
        )


def _first_failure(processes: Sequence[SpawnProcess]) -> SpawnProcess | None:
    """Waits until all have ended well or one has not."""
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in connection.wait(list(waiting)):
            assert isinstance(sentinel, int)
            process = waiting.pop(sentinel)
            process.join()
            if process.exitcode:
                return process
    return None


def _train(
    rank: int, world: int, meeting: Path, plan: Plan, data: Data, settings: Settings, seed: int
) -> None:
    end_with_parent()
    if rank:
        # The first speaks for all.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        ranks = Ranks.join(rank, world, meeting)
        Trainer(plan, data, settings, seed=seed, ranks=ranks).run()
    except SaccadeError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
