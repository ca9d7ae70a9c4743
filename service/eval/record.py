"""What is recorded of a policy: in one document, in a cell, and over the cells of a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.eval.free_text import FreeTask
from service.eval.statistics import differences, interval, ratio
from service.eval.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SOLVED = 0.8
"""Dense accuracy under which a cell says nothing about sparsity."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far estimated coverage was from exact coverage, over (layer, token, head).

    Attributes:
        exact: some of the exact values, [some]; all of them, or a sample of bounded size.
        count: how many there were.
        total, error: sums of the exact values and of the estimates' distances from them.
        over: estimates that were more than 0.05 too high.
    """

    exact: NDArray[np.float64]
    count: int
    total: float
    error: float
    over: int


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """One policy on one document.

    Attributes:
        total: references found, or continuations without a leak; for a passage bits.
        count: references asked for; for a passage bytes.
        n: answers, one a reference; for a passage predicted tokens.
        density: mean over the document's questions.
        coverage: the same; None where it is not known.
        prefill: how the document before the questions was asked to attend.
        prefill_density: the same of it as `density`; None where it was all tail.
    """

    policy: str
    total: float
    count: int
    n: int
    density: float
    coverage: float | None
    fallbacks: int
    calibration: Calibration
    prefill: str = "dense"
    prefill_density: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One policy in one cell.

    Attributes:
        phase: what ran under the policy: "decode" is the question and the answer, or the passage's
            predicted tokens, and the document before them was prefilled densely; "prefill" is all.
        n: answers, one a reference, the same for every policy of the cell; for passages tokens.
        accuracy: share of the references that the answers mention, or of the continuations in
            which nothing planted stands; None for passages.
        low, high: 95% interval of the accuracy, or of the bits per byte; by document.
        prefill_density: as in an answer's `sparsity`, mean; None: dense.
        density, coverage, fallbacks: as in an answer's `sparsity`, means and a sum.
        true_coverage: exact coverage of the audited tokens; None where none was audited.
        coverage_error: mean distance of the estimate from it, by layer, token and head.
        constant_error: the same for the best constant guess, the median of the exact coverage.
        overestimates: share of the estimates that are more than 0.05 too high.
        bits_per_byte: of predicted tokens; None for questions.
        loss: accuracy that dense has more, on the same questions; for passages bits per byte that
            dense needs less. None for dense itself, and where dense was not measured beside it.
        loss_low, loss_high: its 95% interval, by document.
        own_text: whether the text was the user's own.
        commit, machine: what measured it; records of one file may be of several.
        scores: of each document references found and asked for; for passages bits and bytes.
    """

    task: str
    context: int
    policy: str
    phase: str
    n: int
    documents: int
    accuracy: float | None
    low: float
    high: float
    density: float
    coverage: float | None
    true_coverage: float | None
    coverage_error: float | None
    fallbacks: int
    constant_error: float | None = None
    overestimates: float | None = None
    bits_per_byte: float | None = None
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    prefill_density: float | None = None
    own_text: bool = False
    commit: str = ""
    machine: str = ""
    scores: Sequence[Sequence[float]] = ()

    @property
    def asked(self) -> bool:
        """Whether its answers are to questions, which a model solves or does not."""
        return self.accuracy is not None and not isinstance(TASKS.get(self.task), FreeTask)


@dataclass(frozen=True, slots=True)
class Pooled:
    """One policy at one context, over the tasks that dense solves there; every answer counts 1.

    Attributes:
        tasks: which they are.
        n, documents: in all of them.
        dense: accuracy of dense on the same questions.
        density: mean over answers.
        loss: `dense` less `accuracy`; its interval is by document, drawn task by task.
    """

    context: int
    policy: str
    tasks: tuple[str, ...]
    n: int
    documents: int
    dense: float
    accuracy: float
    loss: float
    loss_low: float
    loss_high: float
    density: float


def record_cell(
    task: str, context: int, documents: Sequence[Sequence[DocumentScore]], *, passages: bool
) -> list[Record]:
    """A record for every policy.

    Args:
        task: its name.
        context: tokens.
        documents: in order; each has the scores of every policy, in order.
        passages: whether the scores are bits and bytes.
    """
    columns = list(zip(*documents, strict=True))
    dense = next((_pairs(column) for column in columns if column[0].policy == "dense"), None)
    return [_record(task, context, column, dense, passages) for column in columns]


def solved(records: Sequence[Record]) -> set[tuple[str, int]]:
    """Cells, by task and context, in which dense attention answers most questions.

    Cells without dense, passages and free text have no such bar to pass.
    """
    failed = {
        (r.task, r.context)
        for r in records
        if r.policy == "dense" and r.asked and (r.accuracy or 0.0) < SOLVED
    }
    return {(r.task, r.context) for r in records} - failed


def pooled(records: Sequence[Record]) -> list[Pooled]:
    """A row for every context and policy other than dense, in order of context.

    Only of what was measured beside dense: other records may be of fewer documents.
    """
    good = solved(records)
    dense = {
        (r.task, r.context): r for r in records if r.policy == "dense" and r.asked and r.scores
    }
    kept: dict[tuple[int, str], list[Record]] = {}
    for r in records:
        cell = (r.task, r.context)
        if r.loss is not None and r.scores and cell in dense and cell in good:
            kept.setdefault((r.context, r.policy), []).append(r)
    rows = []
    for (context, policy), cells in sorted(kept.items(), key=lambda item: item[0][0]):
        pairs = [(dense[r.task, r.context].scores, r.scores) for r in cells]
        lost = [differences(*pair) for pair in pairs]
        low, high = interval(*lost)
        flat = [document for scores in lost for document in scores]
        n = sum(r.n for r in cells)
        rows.append(
            Pooled(
                context=context,
                policy=policy,
                tasks=tuple(r.task for r in cells),
                n=n,
                documents=sum(r.documents for r in cells),
                dense=ratio([one for before, _ in pairs for one in before]),
                accuracy=ratio([one for _, after in pairs for one in after]),
                loss=ratio(flat),
                loss_low=low,
                loss_high=high,
                density=sum(r.density * r.n for r in cells) / n,
            )
        )
    return rows


def _pairs(column: Sequence[DocumentScore]) -> list[list[float]]:
    return [[one.total, one.count] for one in column]


def _mean(values: Sequence[tuple[float, int]]) -> float:
    """Mean of values with weights."""
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def _record(
    task: str,
    context: int,
    column: Sequence[DocumentScore],
    dense: list[list[float]] | None,
    passages: bool,
) -> Record:
    scores, policy = _pairs(column), column[0].policy
    value = ratio(scores)
    low, high = interval(scores)
    loss: tuple[float | None, float | None, float | None] = (None, None, None)
    if dense is not None and policy != "dense":
        lost = differences(scores, dense) if passages else differences(dense, scores)
        loss = (ratio(lost), *interval(lost))
    known = [(one.coverage, one.n) for one in column if one.coverage is not None]
    prefills = [
        (one.prefill_density, one.n)
        for one in column
        if one.prefill != "dense" and one.prefill_density is not None
    ]
    parts = [one.calibration for one in column]
    count = sum(part.count for part in parts)
    exact = np.concatenate([part.exact for part in parts])
    return Record(
        task=task,
        context=context,
        policy=policy,
        phase="decode" if column[0].prefill == "dense" else "prefill",
        n=sum(one.n for one in column),
        documents=len(column),
        accuracy=None if passages else value,
        low=low,
        high=high,
        density=_mean([(one.density, one.n) for one in column]),
        coverage=_mean(known) if known else None,
        true_coverage=sum(part.total for part in parts) / count if count else None,
        coverage_error=sum(part.error for part in parts) / count if count else None,
        fallbacks=sum(one.fallbacks for one in column),
        constant_error=float(np.abs(exact - np.median(exact)).mean()) if exact.size else None,
        overestimates=sum(part.over for part in parts) / count if count else None,
        bits_per_byte=value if passages else None,
        loss=loss[0],
        loss_low=loss[1],
        loss_high=loss[2],
        prefill_density=_mean(prefills) if prefills else None,
        scores=scores,
    )
