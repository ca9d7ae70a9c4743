"""Runs the model on a step's work and decides, before anything is emitted, what must run again.

Tokens whose coverage is too low, or whose kernel failed, run once more under their fallback; a
request that breaks the model alone fails alone. `holds` says what falls back.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kernels.errors import PatternError
from kernels.timing import Phases
from models.attention import Recorder
from service.engine import explained, looked
from service.engine.batch import build_step
from service.engine.device import check_alive
from service.engine.holds import (
    body_of,
    dynamic_rows,
    held_by_error,
    hold,
    hold_prompt,
    is_sparse,
    prefills_sparsely,
    prompt_held_by_error,
    spare,
)
from service.engine.outcome import Outcome, checked
from service.engine.sequence import Fallback, Mode, pages_of
from service.engine.trouble import Trouble

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from kernels.cache import LayerCache
    from models.explain import Wanted
    from models.step import StepInput
    from service.engine.replay import Replays
    from service.engine.scheduler import Work
    from service.metrics import Metrics

AUDIT_EVERY = 256
"""Of so many steps with sparse rows one is audited: it also reads every key, and is timed."""

_log = logging.getLogger("saccade.engine")


class Model(Protocol):
    """What the runner needs of `models.decoder.Decoder`."""

    def __call__(self, step: StepInput, caches: Seq[LayerCache], recorder: Recorder) -> Tensor:
        """[tokens, hidden] behind the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] of `hidden` [rows, hidden], float32 or float64."""


class Runner:
    """Executes work on one model and its caches; used by the engine's thread alone.

    Args:
        model: the model.
        caches: one a layer.
        heads: query heads of a layer.
        windows: of each layer.
        metrics: where it reports.
        audit_every: of so many steps with sparse rows one is audited.
        replays: decode steps that need not be launched one by one; None for none.
    """

    def __init__(
        self,
        model: Model,
        caches: Seq[LayerCache],
        heads: int,
        windows: Seq[int | None],
        metrics: Metrics,
        audit_every: int = AUDIT_EVERY,
        replays: Replays | None = None,
    ) -> None:
        self._model = model
        self._caches = caches
        self._heads = heads
        self._windows = windows
        self._metrics = metrics
        self._audit_every = audit_every
        self._replays = replays
        self._device = caches[0].kv.device
        self._sparse_steps = 0
        self._audit: bool | None = None  # whether this step is audited; None for every so many
        self._trouble = Trouble("dynamic selection failed")
        self._prefill_trouble = Trouble("sparse prefill failed")

    @property
    def degraded(self) -> str | None:
        """Why dynamic selection or sparse prefill does not run at present."""
        return self._trouble.reason or self._prefill_trouble.reason

    def run(self, work: Seq[Work], audit: bool | None = None) -> list[Outcome]:
        """Compute `work`; one outcome each, in order, whatever happens to the others.

        Args:
            work: what to compute.
            audit: whether sparse rows are audited; by default in one of `audit_every` steps.
        """
        self._audit = audit
        outcomes = self._run(work)
        sound = [outcome.work for outcome in outcomes if outcome.error is None]
        self._trouble.note(
            failed=any(held_by_error(item) for item in work),
            ran=any(dynamic_rows(item) for item in sound),
        )
        # What fails under its fallback, too, tells of itself: a dense prompt has no other.
        self._prefill_trouble.note(
            failed=any(prompt_held_by_error(item) for item in sound),
            ran=any(prefills_sparsely(item) for item in sound),
        )
        return outcomes

    def _run(self, work: Seq[Work]) -> list[Outcome]:
        try:
            return self._judged(work)
        except Exception as error:  # noqa: BLE001  the boundary that keeps one request's
            # failure from the others: whatever the model raises, find whose it is.
            self.check_device(error)
            if len(work) > 1:
                return [outcome for item in work for outcome in self._run([item])]
            return [self._rescue(work[0], error)]

    def check_device(self, error: Exception) -> None:
        """After `error`: whether the device still answers, so that the failure is a request's own.

        Raises:
            EngineDeadError: it does not.
        """
        check_alive(self._device, error)

    def copy_pages(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy (source, target) pages in every layer."""
        for source, target in pairs:
            for cache in self._caches:
                cache.copy_page(source, target)

    def sound(self, pages: Seq[int]) -> list[bool]:
        """Of complete physical pages, whether all their keys and values are finite."""
        index = torch.tensor(pages, device=self._device)
        sums = [cache.soundness(index) for cache in self._caches]  # [pages] of each layer
        return torch.stack(sums).isfinite().all(0).tolist()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] of `hidden` [rows, hidden]."""
        return self._model.logits(hidden)

    def next_logits(self, outcome: Outcome) -> Tensor:
        """Logits [vocab] of the token behind the last of `outcome`, which has not failed."""
        if outcome.logits is not None:
            return outcome.logits
        assert outcome.hidden is not None
        return self._model.logits(outcome.hidden[-1:])[0]

    def _judged(self, work: Seq[Work]) -> list[Outcome]:
        outcomes = self._forward(work)
        # By place: from which position on a prompt's pages have yet to be judged.
        judged = {place: item.sequence.decided for place, item in enumerate(work)}
        while judged:
            again: dict[int, int] = {}
            for place, since in judged.items():
                rows = self._falls_back(outcomes[place])
                until = self._prompt_falls_back(outcomes[place], since)
                if rows or until is not None:
                    again[place] = since if until is None else until
            redone = self._forward([work[place] for place in again]) if again else []
            for place, outcome in zip(again, redone, strict=True):
                outcomes[place] = outcome
            judged = again
        return checked(outcomes)

    def _rescue(self, item: Work, error: Exception) -> Outcome:
        """One item alone failed: once more without what is sparse in it, else give up."""
        failure = error
        if isinstance(error, PatternError):  # the request's own is too much: nobody else's trouble
            return Outcome(item, None, None, f"sparsity.pattern: {error}")
        if prefills_sparsely(item):
            _log.warning("sparse prefill failed, going on densely", exc_info=error)
            self._prefill_trouble.told = f"sparse prefill failed: {type(error).__name__}"
            hold_prompt(item, item.start, Fallback.KERNEL_ERROR)
            [outcome] = self._run([item])
            return outcome
        if dynamic_rows(item):
            _log.warning("dynamic selection failed, using the fixed pattern", exc_info=error)
            self._trouble.told = f"dynamic selection failed: {type(error).__name__}"
            hold(item, Fallback.KERNEL_ERROR)
            try:
                return checked(self._forward([item]))[0]
            except Exception as second:  # noqa: BLE001  the request's own boundary, as above
                self.check_device(second)
                failure = second
        _log.error("request %s failed", item.sequence.request.id, exc_info=failure)
        return Outcome(item, None, None, f"the model failed on this request: {_name(failure)}")

    def _falls_back(self, outcome: Outcome) -> bool:
        """Whether an outcome's tail or generated tokens must run again, under a fallback."""
        rows = dynamic_rows(outcome.work)
        if not rows:
            return False
        assert outcome.looked is not None
        coverage = outcome.looked.coverage[:, rows]
        floor = outcome.work.sequence.request.sparsity.min_coverage
        if not np.isfinite(coverage).all():
            self._trouble.told = "dynamic selection met scores that are not finite"
            hold(outcome.work, Fallback.KERNEL_ERROR)
        elif floor > 0 and coverage.mean() < floor and outcome.work.sequence.cut is not None:
            spare(outcome.work)
        elif floor > 0 and coverage.mean() < floor:
            hold(outcome.work, Fallback.LOW_COVERAGE)
        else:
            return False
        return True

    def _prompt_falls_back(self, outcome: Outcome, since: int) -> int | None:
        """From where on pages of the prompt, before its tail, are judged when it has run again.

        The first page from `since` on that must not stay as it is goes to its fallback, and some
        behind it. Those farther behind are judged again, by what they see then: so what falls back
        depends on the prompt alone, not on the chunks. None: there is no such page.
        """
        item, wanted = outcome.work, outcome.work.sequence.request.sparsity
        if outcome.prefilled is None or wanted.prefill != "dynamic":
            return None  # of a pattern nobody estimates what it covers
        for page, coverage in zip(
            pages_of(body_of(item)), outcome.prefilled.coverage.tolist(), strict=True
        ):
            if page.start < since or item.sequence.mode(page.start) is Mode.DENSE:
                continue
            if not math.isfinite(coverage):
                self._prefill_trouble.told = "sparse prefill met scores that are not finite"
                return hold_prompt(item, page.start, Fallback.KERNEL_ERROR)
            if coverage < wanted.min_coverage:
                return hold_prompt(item, page.start, Fallback.LOW_COVERAGE)
        return None

    def _forward(self, work: Seq[Work]) -> list[Outcome]:
        if self._device.type == "cuda":  # of this thread: where Triton launches
            torch.cuda.set_device(self._device)
        sparse = any(is_sparse(item) for item in work)
        self._sparse_steps += sparse
        due = (self._sparse_steps - 1) % self._audit_every == 0
        audit = sparse and (due if self._audit is None else self._audit)
        eager = audit or any(_is_explained(item) for item in work)
        replayed = None if eager or self._replays is None else self._replays.run(work)
        return self._eager(work, audit=audit) if replayed is None else replayed

    def _eager(self, work: Seq[Work], *, audit: bool) -> list[Outcome]:
        step = build_step(work, self._device)
        recorder = Recorder(Phases(on=audit), explain=self._wanted(work))
        hidden = self._model(step, self._caches, recorder)  # [tokens, hidden]
        for phase, seconds in recorder.phases.seconds.items():
            self._metrics.attention_seconds(phase, seconds / len(self._caches))
        seen = looked.of_step(step, recorder, self._windows, self._heads)
        outcomes, first = [], 0
        for item in work:
            part, body, prefilled = slice(first, first + item.count), body_of(item), None
            if body:
                prefilled = looked.of_prefill(step, recorder, first, body)
            mine, last = seen.cut(part), first + item.count - 1
            told = None
            if last in recorder.explain:
                glances = [one for one in recorder.glances if one.place == last]
                told = explained.of_token(glances, mine, item.count - 1, item.stop)
            outcomes.append(Outcome(item, hidden[part], mine, prefilled=prefilled, explained=told))
            first += item.count
        return outcomes

    def _wanted(self, work: Seq[Work]) -> dict[int, Wanted]:
        """By place in the step: the tokens that are to be explained."""
        found, first = {}, 0
        for item in work:
            first += item.count
            explain = item.sequence.request.sparsity.explain
            if explain is not None and item.samples:
                found[first - 1] = explained.wanted(explain, len(self._caches), self._heads)
        return found


def _is_explained(item: Work) -> bool:
    """Whether the answer tells what the item's last token attended to."""
    return item.samples and item.sequence.request.sparsity.explain is not None


def _name(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else type(error).__name__
