"""Spreads an evaluation over processes: some draw documents, some put them to a model."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from models.loader import load
from models.tokenizer import Tokenizer
from service.eval.cell import Cell, Item
from service.eval.crew import Crew
from service.eval.measure import Examiner
from service.eval.passages import PassageTask
from service.eval.room import TOGETHER, Room
from service.eval.session import Session
from service.eval.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from service.eval.drawer import Drawing
    from service.eval.paper import Paper
    from service.eval.record import DocumentScore

    Finding = tuple[Item, list[DocumentScore]]

TARGETS = 4
"""A passage's share of what runs together: so many answers', since it has more rows in a step."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process needs to examine a model.

    Attributes:
        model: checkpoint folder.
        dtype, load_format: as in the configuration.
        tokens: of the longest context.
    """

    model: Path
    dtype: str
    load_format: Literal["safetensors", "dummy"]
    tokens: int

    def examiner(self, device: torch.device, sharing: int = 1) -> Examiner:
        """Load the model.

        Args:
            device: where to.
            sharing: processes that share a GPU, this one included.

        Raises:
            ModelError: the checkpoint cannot be loaded, or holds no such context.
            GenerationError: the device's memory does not hold one document.
        """
        tokenizer = Tokenizer.from_folder(self.model)
        decoder, shape = load(self.model, self.dtype, device, self.load_format)
        dtype = decoder.model.embed_tokens.weight.dtype
        room = Room.on(device, shape, dtype, self.tokens, sharing)
        return Examiner(Session(decoder, shape, tokenizer, room))


@dataclass(slots=True)
class Batch:
    """Documents of one cell that are put to the model together."""

    cell: Cell
    numbers: list[int]  # of the documents
    papers: dict[int, Paper] = field(default_factory=dict)  # by number, those that are drawn

    @property
    def items(self) -> list[Item]:
        """Its documents, in order."""
        return [Item(self.cell, number) for number in self.numbers]

    def measure(self, examiner: Examiner) -> list[list[DocumentScore]]:
        """Of each document, in order, the scores of every policy."""
        papers = [self.papers[number] for number in self.numbers]
        return examiner.measure(papers, self.cell.policies)


def examine(
    setup: Setup,
    drawing: Drawing,
    cells: Sequence[Cell],
    device: torch.device,
    workers: int = 1,
    drawers: int = 0,
) -> Iterator[Finding]:
    """The scores of every document, in the order in which they come.

    Args:
        setup: the model.
        drawing: the documents.
        cells: what to measure.
        device: with several workers "cuda" is every visible GPU in turn.
        workers: processes that have a model each.
        drawers: processes that draw documents, and keep some ahead. Without any, one worker draws
            its own, in this process.

    Raises:
        SaccadeError: a document failed, or a process died.
        RuntimeError: a process failed on what is a mistake in the program; has its traceback.
    """
    batches = _batches(cells, drawing.questions, device)
    workers = min(workers, len(batches))
    if workers <= 1 and drawers == 0:
        examiner, drawer = setup.examiner(device), drawing.drawer()
        for batch in batches:
            batch.papers = {item.document: drawer(item) for item in batch.items}
            yield from zip(batch.items, batch.measure(examiner), strict=True)
            batch.papers.clear()
        return
    drawers = max(1, min(drawers, sum(len(batch.numbers) for batch in batches)))
    devices = _devices(device, workers)
    threads = max(1, torch.get_num_threads() // workers) if device.type == "cpu" else 1
    works = [partial(_worker, setup, one, devices.count(one), threads) for one in devices]
    with Crew("drawer", [drawing.drawer] * drawers) as drawn, Crew("worker", works) as worked:
        yield from _through(batches, drawn, worked, ahead=workers + 1)


def default_drawers(device: torch.device, workers: int) -> int:
    """Processes that draw unless something else is asked for: a GPU must not wait for them.

    A CPU takes far longer to answer than to draw, and has no core to spare.
    """
    return 0 if device.type == "cpu" else max(1, len(os.sched_getaffinity(0)) - workers)


def _batches(cells: Sequence[Cell], questions: int, device: torch.device) -> list[Batch]:
    """Every cell's documents, in order: one by one on a CPU, else as many as fill a GPU."""
    batches = []
    for cell in cells:
        task, together = TASKS[cell.task], 1
        if device.type != "cpu":
            room = TOGETHER[device.type]
            together = (
                room // TARGETS
                if isinstance(task, PassageTask)
                else max(1, room // min(questions, task.questions))
            )
        parts = np.array_split(np.arange(cell.documents), -(-cell.documents // together))
        batches += [Batch(cell, part.tolist()) for part in parts]
    return batches


def _through(
    batches: list[Batch],
    drawers: Crew[Item, Paper],
    workers: Crew[Batch, list[list[DocumentScore]]],
    ahead: int,
) -> Iterator[Finding]:
    """Every batch drawn, at most `ahead` beyond those that workers have, and measured."""
    homes = {item: batch for batch in batches for item in batch.items}
    undrawn = deque((place, item) for place, one in enumerate(batches) for item in one.items)
    complete: deque[Batch] = deque()
    given, left = 0, len(batches)
    while left:
        while workers.idle and complete:
            workers.give(complete.popleft())
            given += 1
        while drawers.idle and undrawn and undrawn[0][0] < given + ahead:
            drawers.give(undrawn.popleft()[1])
        for pipe in wait([*workers.busy, *drawers.busy]):
            assert isinstance(pipe, Connection)
            if pipe in workers.busy:
                done = workers.hear(pipe)
                if done is not None:
                    batch, scores = done
                    batch.papers.clear()
                    left -= 1
                    yield from zip(batch.items, scores, strict=True)
            else:
                drawn = drawers.hear(pipe)
                if drawn is not None:
                    item, paper = drawn
                    batch = homes[item]
                    batch.papers[item.document] = paper
                    if len(batch.papers) == len(batch.numbers):
                        complete.append(batch)


def _devices(device: torch.device, workers: int) -> list[torch.device]:
    """One for each worker; a GPU by number is all there is."""
    if device.type != "cuda" or device.index is not None:
        return [device] * workers
    count = torch.cuda.device_count()
    return [torch.device("cuda", number % count) for number in range(workers)]


def _worker(
    setup: Setup, device: torch.device, sharing: int, threads: int
) -> Callable[[Batch], list[list[DocumentScore]]]:
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    examiner = setup.examiner(device, sharing)
    return lambda batch: batch.measure(examiner)
