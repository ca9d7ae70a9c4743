"""Runs the model on a step's work and decides, before anything is emitted, what must run again.

Tokens whose coverage is too low, or whose kernel failed, run once more under their fallback; a
request that breaks the model alone fails alone. What falls back is kept in the sequence, which
`decide` counts it from.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.timing import Phases
from models.attention import Recorder
from service.engine import explained, looked
from service.engine.batch import build_step
from service.engine.device import check_alive
from service.engine.sequence import Fallback, Mode, pages_of
from service.engine.trouble import Trouble

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from kernels.cache import LayerCache
    from models.explain import Wanted
    from models.step import StepInput
    from service.engine.explained import Explained
    from service.engine.replay import Replays
    from service.engine.scheduler import Work
    from service.engine.tally import Looked, Prefilled
    from service.metrics import Metrics

AUDIT_EVERY = 256
"""Of so many steps with sparse rows one is audited: it also reads every key, and is timed."""
HOLD = 32
"""Tokens that stay on a fallback before the dynamic policy is tried again."""
PROMPT_HOLD = 32 * PAGE
"""The same of a prompt before its tail: each time it is tried costs a step more."""

_log = logging.getLogger("saccade.engine")


class Model(Protocol):
    """What the runner needs of `models.decoder.Decoder`."""

    def __call__(self, step: StepInput, caches: Seq[LayerCache], recorder: Recorder) -> Tensor:
        """[tokens, hidden] behind the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] of `hidden` [rows, hidden], float32 or float64."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one piece of work."""

    work: Work
    # [count, hidden] behind the final norm; None when it failed, or when a graph was replayed.
    hidden: Tensor | None
    looked: Looked | None
    error: str | None = None
    prefilled: Prefilled | None = None  # of its tokens before the prompt's tail, if any
    # Of a replayed row, on the host.
    logits: Tensor | None = None  # float32 [vocab]
    finite: bool | None = None  # whether the hidden state is
    explained: Explained | None = None  # what its last token attended to, where asked for


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
            failed=any(_held_by_error(item) for item in work),
            ran=any(dynamic_rows(item) for item in sound),
        )
        # What fails under its fallback, too, tells of itself: a dense prompt has no other.
        self._prefill_trouble.note(
            failed=any(_prompt_held_by_error(item) for item in sound),
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
        return _finite(outcomes)

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
                return _finite(self._forward([item]))[0]
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
        sparse = any(_is_sparse(item) for item in work)
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


def hold(item: Work, reason: Fallback) -> None:
    """Send the item's undecided tokens, and `HOLD` more, to the fallback for `reason`."""
    item.sequence.hold_reason = reason
    item.sequence.hold_until = item.stop + HOLD


def spare(item: Work) -> None:
    """Give the item's undecided tokens, and all behind them, their whole budget again."""
    item.sequence.cut, item.sequence.spared = None, True


def body_of(item: Work) -> range:
    """Positions of the item's tokens that are of the prompt before its tail."""
    return range(item.start, max(item.start, min(item.stop, item.sequence.request.tail_start)))


def prefills_sparsely(item: Work) -> bool:
    """Whether some of these do not attend densely."""
    mode = item.sequence.mode
    return any(mode(page.start) is not Mode.DENSE for page in pages_of(body_of(item)))


def hold_prompt(item: Work, start: int, reason: Fallback) -> int:
    """Have a prompt attend densely from the page of `start` on, also when it is computed again.

    Up to its tail where something failed, that would fail at every try; else for `PROMPT_HOLD`.

    Returns:
        Up to which position.
    """
    sequence, stop = item.sequence, item.sequence.request.tail_start
    if reason is not Fallback.KERNEL_ERROR:
        stop = min(stop, start + PROMPT_HOLD)
    for page in range(start // PAGE * PAGE, stop, PAGE):
        sequence.fallbacks.setdefault(page, reason)
    return stop


def _is_explained(item: Work) -> bool:
    """Whether the answer tells what the item's last token attended to."""
    return item.samples and item.sequence.request.sparsity.explain is not None


def _is_sparse(item: Work) -> bool:
    """Whether some of the item's tokens attend to selected keys."""
    sequence = item.sequence
    first = max(item.start, sequence.request.tail_start)
    return any(sequence.mode(at) is not Mode.DENSE for at in range(first, item.stop))


def _held_by_error(item: Work) -> bool:
    sequence = item.sequence
    return sequence.hold_reason is Fallback.KERNEL_ERROR and item.start < sequence.hold_until


def _prompt_held_by_error(item: Work) -> bool:
    fallback = item.sequence.fallback
    return any(fallback(page.start) is Fallback.KERNEL_ERROR for page in pages_of(body_of(item)))


def dynamic_rows(item: Work) -> list[int]:
    """Places within the item of the undecided tokens that attend dynamically."""
    sequence = item.sequence
    first = max(item.start, sequence.request.tail_start, sequence.decided)
    return [
        position - item.start
        for position in range(first, item.stop)
        if sequence.mode(position) is Mode.DYNAMIC
    ]


def decide(item: Work, note: Callable[[Fallback, Mode, int], None]) -> int:
    """Fix how the item's tokens attended, for good; `note` hears why how many went where.

    Returns:
        How many of the item's first tokens had been decided before or are not under the policy.
    """
    sequence = item.sequence
    fresh = max(item.start, sequence.decided)
    for page in pages_of(range(fresh, body_of(item).stop)):
        reason = sequence.fallback(page.start)
        if reason is not None:
            note(reason, sequence.mode(page.start), len(page))
    first = max(fresh, sequence.request.tail_start)
    for position in range(first, item.stop):
        reason = sequence.fallback(position)
        if reason is not None:
            sequence.fallbacks[position] = reason
            if reason is Fallback.OVERLOAD:
                sequence.cuts[position] = sequence.wanted(position)
            note(reason, sequence.mode(position), 1)
    sequence.decided = max(sequence.decided, item.stop)
    return max(0, min(first, item.stop) - item.start)


def _finite(outcomes: Seq[Outcome]) -> list[Outcome]:
    """The outcomes, with an error in the place of those that cannot be sampled from."""
    ends = [one.hidden[-1] for one in outcomes if one.work.samples and one.hidden is not None]
    # One question to the device for all of them.
    sound = iter(torch.isfinite(torch.stack(ends)).all(-1).tolist() if ends else ())
    checked = []
    for outcome in outcomes:
        seen = outcome.looked
        assert seen is not None
        finite = outcome.finite
        if outcome.work.samples and not (next(sound) if finite is None else finite):
            error = "the model's output for this is not finite"
            checked.append(Outcome(outcome.work, None, None, error))
            continue
        # A fixed pattern's coverage is informative only: where it is not judged or its scores
        # overflow, nothing is known to be covered, and an audit has nothing to compare.
        exact = np.zeros(0) if seen.exact is None else seen.exact
        if not (np.isfinite(seen.coverage).all() and np.isfinite(exact).all()):
            known = np.nan_to_num(seen.coverage, nan=0.0, posinf=0.0)
            seen = replace(seen, coverage=known, exact=None)
        checked.append(replace(outcome, looked=seen))
    return checked


def _name(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else type(error).__name__
