"""Puts papers to a model and scores what comes back, policy by policy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from service.eval.paper import Dictation, Exam
from service.eval.record import Calibration, DocumentScore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.engine.types import SparsityReport
    from service.eval.paper import Paper
    from service.eval.policies import NamedPolicy
    from service.eval.script import Audit
    from service.eval.session import Answer, Forced, Session

SAMPLE = 4096
"""Most exact coverages kept of a document and policy."""
TOO_HIGH = 0.05
"""An estimate that exceeds the exact coverage by more is an overestimate."""


class Examiner:
    """Runs every policy on papers and scores them; a paper's scores depend on no other."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def measure(
        self, papers: Sequence[Paper], policies: Sequence[NamedPolicy]
    ) -> list[list[DocumentScore]]:
        """Of each paper, the scores of every policy.

        Args:
            papers: either exams or dictations.
            policies: what to compare.

        Raises:
            GenerationError: the model failed, or has no room for a paper.
        """
        exams = [paper for paper in papers if isinstance(paper, Exam)]
        dictations = [paper for paper in papers if isinstance(paper, Dictation)]
        assert not (exams and dictations)
        sparsities = [policy.sparsity for policy in policies]
        marks: list[list[DocumentScore]] = []  # by policy
        if exams:
            given = self._session.answers(exams, sparsities)
            for policy, answers in zip(policies, given, strict=True):
                pairs = zip(exams, answers, strict=True)
                marks.append([_exam_score(policy.name, *pair) for pair in pairs])
        else:
            costs = self._session.forced(dictations, sparsities)
            for policy, forced in zip(policies, costs, strict=True):
                predicted = zip(dictations, forced, strict=True)
                marks.append([_dictation_score(policy.name, *pair) for pair in predicted])
        return [list(scores) for scores in zip(*marks, strict=True)]


def _exam_score(policy: str, exam: Exam, answers: Sequence[Answer]) -> DocumentScore:
    pairs = zip(exam.questions, answers, strict=True)
    found = sum(asked.found(answer.text) for asked, answer in pairs)
    count = sum(len(asked.references) for asked in exam.questions)
    return _score(
        policy,
        (found, count, count),
        [answer.report for answer in answers],
        [answer.audit for answer in answers],
    )


def _dictation_score(policy: str, dictation: Dictation, forced: Forced) -> DocumentScore:
    bits = float(forced.nats[dictation.skipped :].sum()) / math.log(2)
    counted = dictation.targets - dictation.skipped
    return _score(policy, (bits, dictation.size, counted), [forced.report], [forced.audit])


def _score(
    policy: str,
    counts: tuple[float, int, int],
    reports: Sequence[SparsityReport],
    audits: Sequence[Audit],
) -> DocumentScore:
    coverages = [report.coverage for report in reports if report.coverage is not None]
    fallbacks = sum(
        tokens
        for report in reports
        for reason, tokens in report.fallbacks.items()
        if reason != "requested"
    )
    prefills = [report.prefill for report in reports if report.prefill is not None]
    total, count, n = counts
    return DocumentScore(
        policy=policy,
        total=total,
        count=count,
        n=n,
        density=float(np.mean([report.density for report in reports])),
        coverage=float(np.mean(coverages)) if coverages else None,
        fallbacks=fallbacks,
        calibration=calibration(audits),
        prefill=prefills[0].policy if prefills else "dense",
        prefill_density=float(np.mean([one.density for one in prefills])) if prefills else None,
    )


def calibration(audits: Sequence[Audit]) -> Calibration:
    """Errors of the estimates, over every audited layer, token and head."""
    exact = np.concatenate([audit.exact.ravel() for audit in audits])
    off = np.concatenate([audit.estimated.ravel() for audit in audits]) - exact
    kept = exact
    if exact.size > SAMPLE:
        kept = np.random.default_rng(0).choice(exact, SAMPLE, replace=False)
    return Calibration(
        exact=kept,
        count=exact.size,
        total=float(exact.sum()),
        error=float(np.abs(off).sum()),
        over=int((off > TOO_HIGH).sum()),
    )
