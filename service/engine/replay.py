"""Decode steps as CUDA graphs: fills in a step's rows, replays it, and reads what came out."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.page import PAGE
from models.decode_step import DecodeStep
from service.engine import looked
from service.engine.batch import dynamic_policy
from service.engine.outcome import Outcome
from service.engine.sequence import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from models.decode_step import Bucket
    from models.graph import CapturedStep, CapturedSteps
    from service.engine.scheduler import Work
    from service.metrics import Metrics

_log = logging.getLogger("saccade.engine")


class Replays:
    """The captured steps of one model, for the engine's thread.

    Args:
        steps: what has been captured.
        device: where they run.
        heads: query heads of a layer.
        windows: of each layer.
        metrics: where replays are counted.
    """

    def __init__(
        self,
        steps: CapturedSteps,
        device: torch.device,
        heads: int,
        windows: Seq[int | None],
        metrics: Metrics,
    ) -> None:
        self._steps, self._device = steps, device
        self._heads, self._windows = heads, windows
        self._metrics = metrics
        self._inputs: dict[Bucket, _Input] = {}

    def run(self, work: Seq[Work]) -> list[Outcome] | None:
        """Compute `work`, if it is one token each of sequences whose kinds are captured.

        Dense rows and dynamic ones are a step each: both read the weights, which still takes less
        than launching the kernels one by one.

        Returns:
            One outcome each, in order; None where the work is another, or where a step failed. That
            step is not replayed again, and what it wrote can be written over.
        """
        groups = self._groups(work)
        if groups is None:
            return None
        try:
            return self._replayed(work, groups)
        except Exception as error:  # noqa: BLE001  whatever it is, the model runs without
            _log.warning("a captured decode step failed", exc_info=error)
            self._metrics.graphs_failed("replay", 1)
            for step, _ in groups:
                self._steps.drop(step)
            return None

    def _groups(self, work: Seq[Work]) -> list[tuple[CapturedStep, list[int]]] | None:
        """The steps that hold all of `work`, and the places of each one's rows."""
        places: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for place, item in enumerate(work):
            way = _way(item)
            if way is None:
                return None
            places[way].append(place)
        groups = []
        for (dynamic, dense_layers), rows in places.items():
            pages = max(-(-work[place].stop // PAGE) for place in rows)
            step = self._steps.find(len(rows), pages, dynamic=dynamic, dense_layers=dense_layers)
            if step is None:
                return None
            groups.append((step, rows))
        return groups

    def _replayed(
        self, work: Seq[Work], groups: Seq[tuple[CapturedStep, list[int]]]
    ) -> list[Outcome]:
        fetched = []
        for step, places in groups:
            if step.bucket not in self._inputs:
                self._inputs[step.bucket] = _Input(step.bucket, self._device)
            filled = self._inputs[step.bucket].fill([work[place] for place in places])
            fetched.append(step.fetch(step.replay(filled)))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._metrics.graphs_replayed(len(groups))
        outcomes: dict[int, Outcome] = {}
        for (_, places), decoded in zip(groups, fetched, strict=True):
            positions = [work[place].start for place in places]
            seen = looked.of_replay(decoded, positions, self._windows, self._heads)
            totals = decoded.total.tolist()
            for row, place in enumerate(places):
                outcomes[place] = Outcome(
                    work[place],
                    None,
                    seen.cut(slice(row, row + 1)),
                    logits=decoded.logits[row],
                    finite=math.isfinite(totals[row]),
                )
        return [outcomes[place] for place in range(len(work))]


def _way(item: Work) -> tuple[bool, int] | None:
    """Whether a decode row chooses its keys, and its dense layers; None for what is not captured.

    That is other work, fixed patterns and plain top-k.
    """
    sequence = item.sequence
    mode = sequence.mode(item.start) if item.count == 1 and item.samples else None
    if mode is Mode.DENSE:
        return False, 0
    sparsity = sequence.request.sparsity
    return (True, sparsity.dense_layers) if mode is Mode.DYNAMIC and sparsity.sampled else None


class _Input:
    """A step's input on the host, kept from step to step: most of a block table stays as it was."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        # Pinned: the device copies it without a wait, and has done so when a step's result is in.
        self._step = DecodeStep.padding(bucket, pinned=device.type == "cuda")
        self._dynamic = bucket.dynamic
        self._limits, self._columns = self._step.limits.numpy(), self._step.columns.numpy()
        self._padding = self._columns[:, :1].copy()
        self._tables = self._step.rows.block_tables.numpy()
        # Of each row: the sequence's list of pages, and how many of them its table has.
        self._known: list[tuple[list[int], int]] = [([], 0)] * bucket.batch

    def fill(self, work: Seq[Work]) -> DecodeStep:
        """The step of `work`, a token each; it lasts until the next one is filled."""
        rows = []
        for row, item in enumerate(work):
            pages, position = item.sequence.pages, item.start
            self._put(row, pages, -(-item.stop // PAGE))
            slot = pages[position // PAGE] * PAGE + position % PAGE
            rows.append((item.sequence.tokens[position], position, slot, position + 1, 0))
        count = len(rows)
        self._columns[:, :count] = np.array(rows, dtype=np.int64).T
        self._columns[:, count:] = self._padding
        if self._dynamic:  # those of padding have no meaning
            self._limits[:count] = [
                dynamic_policy(item.sequence.wanted(item.start)).limits for item in work
            ]
        return self._step

    def _put(self, row: int, pages: list[int], end: int) -> None:
        """Write a sequence's first pages into a row's table: those that it does not have yet."""
        known, count = self._known[row]
        if known is not pages:  # a list grows, and is never changed otherwise
            self._tables[row] = 0
            count = 0
        self._tables[row, count:end] = pages[count:end]
        self._known[row] = (pages, max(count, end))
