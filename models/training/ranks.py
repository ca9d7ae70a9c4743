"""What the processes that train one model together, one a GPU of this host, tell each other."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from models.training.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

_TIMEOUT = timedelta(minutes=15)  # longer than the first process's longest check


class Ranks:
    """This process among all of the run; by default it is alone and tells nobody anything."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def join(cls, rank: int, world: int, meeting: Path) -> Ranks:
        """Waits for the others; `meeting` is a file that all can write and that is not there yet.

        Raises:
            TrainingError: the others do not come.
        """
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl"
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // world))
        if sys.platform == "linux":
            # All are on this host, whose own name need not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with _loss_of_others():
            store = distributed.FileStore(str(meeting), world)  # type: ignore[attr-defined]
            distributed.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT
            )
            if torch.cuda.is_available():
                distributed.all_reduce(torch.zeros(1, device="cuda"))  # NCCL sets up at first use
        return cls(rank, world)

    @property
    def first(self) -> bool:
        """Whether this process keeps the clock and writes the files."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64; they pass through the host, not the GPU.

        Raises:
            TrainingError: another process is gone.
        """
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)  # [values]
        with _loss_of_others():
            distributed.all_reduce(sums)
        return sums.tolist()

    def meet(self) -> None:
        """Returns when all processes have called it."""
        self.total([0.0])

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces every gradient by its sum over the processes.

        Raises:
            TrainingError: another process is gone.
        """
        if self.world == 1:
            return
        with _loss_of_others():
            for parameter in parameters:
                distributed.all_reduce(parameter.grad)

    @torch.no_grad()
    def difference(self, parameters: Iterable[Tensor]) -> float:
        """Largest distance of a value in any process from the first one's; 0 when all is well."""
        if self.world == 1:
            return 0.0
        largest = 0.0
        with _loss_of_others():
            for parameter in parameters:
                other = parameter.detach().clone()
                distributed.broadcast(other, 0)
                largest = max(largest, float((parameter - other).abs().max()))
        return max(self.total([largest if i == self.rank else 0.0 for i in range(self.world)]))

    def leave(self) -> None:
        """Ends the exchange; all processes call it, and what follows is each one's own."""
        if self.world > 1:
            distributed.destroy_process_group()


@contextmanager
def _loss_of_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            "Another process of the run is gone or does not answer "
            f"({str(error).splitlines()[0]}): see its output."
        ) from error
