"""Runs a task's document: every policy on the same questions, or on the same passage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.errors import TemplateError
from service.eval.passages import PassageTask
from service.eval.record import Calibration, DocumentScore
from service.eval.source import Source
from service.eval.tasks import TASKS, Document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.tokenizer import Tokenizer
    from service.engine.types import SparsityReport
    from service.eval.policies import NamedPolicy
    from service.eval.session import Audit, Session
    from service.eval.tasks import Task

SAMPLE = 4096
"""Most exact coverages kept of a document and policy."""
TOO_HIGH = 0.05
"""An estimate that exceeds the exact coverage by more is an overestimate."""


@dataclass(frozen=True, slots=True)
class Item:
    """One document of one cell: the unit of work."""

    task: str
    context: int
    document: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with every document.

    Attributes:
        policies: what to compare.
        questions: most questions to ask about a document.
        seed: of the documents; a task and a context have documents of their own.
    """

    policies: tuple[NamedPolicy, ...]
    questions: int
    seed: int


class Examiner:
    """Draws documents and runs every policy on each.

    Args:
        session: with room for the longest context.
        tokenizer: the model's.
        source: text to hide facts in, and to predict.
        plan: what to do with a document.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, source: Source, plan: Plan) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._source = source
        self._plan = plan

    def measure(self, item: Item) -> list[DocumentScore]:
        """The scores of every policy; they depend on the item alone.

        Raises:
            GenerationError: the model failed.
            ConfigError: there is too little text for this.
        """
        task = TASKS[item.task]
        if isinstance(task, PassageTask):
            return self._predict(task, item)
        return self._ask(task, item)

    def _ask(self, task: Task, item: Item) -> list[DocumentScore]:
        rng = np.random.default_rng(
            [self._plan.seed, _number(task.name), item.context, item.document]
        )
        room = item.context - _reserve(task, self._tokenizer)
        document = task.make(rng, self._source, room, self._plan.questions)
        asked = document.questions
        prompts = [prompt_tokens(self._tokenizer, document, i) for i in range(len(asked))]
        scores = []
        for policy in self._plan.policies:
            answers = self._session.answers(prompts, policy.sparsity, task.answer_tokens)
            found = [one.found(answer.text) for one, answer in zip(asked, answers, strict=True)]
            count = sum(len(one.references) for one in asked)
            scores.append(
                _score(
                    policy.name,
                    (sum(found), count, count),
                    [answer.report for answer in answers],
                    [answer.audit for answer in answers],
                )
            )
        return scores

    def _predict(self, task: PassageTask, item: Item) -> list[DocumentScore]:
        # Without the context: whatever the length, the same passage is predicted.
        rng = np.random.default_rng([self._plan.seed, _number(task.name), item.document])
        first = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        passage = task.make(rng, self._source, item.context - len(first))
        counted = passage.targets - passage.skipped
        size = self._bytes(passage.tokens, counted)
        scores = []
        for policy in self._plan.policies:
            forced = self._session.forced(
                [*first, *passage.tokens], passage.targets, policy.sparsity
            )
            bits = float(forced.nats[passage.skipped :].sum()) / math.log(2)
            scores.append(
                _score(policy.name, (bits, size, counted), [forced.report], [forced.audit])
            )
        return scores

    def _bytes(self, tokens: Sequence[int], counted: int) -> int:
        """Bytes of text in the last `counted` tokens."""
        # With some tokens before: a decoder may drop a text's leading space.
        before = list(tokens[-counted - 16 : -counted])
        both = self._tokenizer.decode([*before, *tokens[-counted:]])
        return len(both.encode()) - len(self._tokenizer.decode(before).encode())


def prompt_tokens(tokenizer: Tokenizer, document: Document, question: int) -> list[int]:
    """A document and one of its questions as the model was trained to read them.

    A chat, where the checkpoint has a template; else `Question: ...` and `Answer:`.
    """
    asked = document.questions[question].text
    try:
        text = tokenizer.render_chat(
            [{"role": "user", "content": f"{document.text}\n\n{asked}"}],
            add_generation_prompt=True,
        )
    except TemplateError:
        return tokenizer.encode(f"{document.text}\n\nQuestion: {asked}\nAnswer:")
    return tokenizer.encode(text, add_special_tokens=False)


def _number(name: str) -> int:
    return int.from_bytes(name.encode()[-8:], "big")


def _reserve(task: Task, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt that are not the document's: the longest question, and the template."""
    source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False))
    some = task.make(np.random.default_rng(0), source, 2048, 1)
    return len(prompt_tokens(tokenizer, Document("", some.questions), 0)) + 16


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
