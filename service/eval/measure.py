"""Cells of the quality table: a task at a context, every policy on the same questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from models.errors import TemplateError
from service.eval.tasks import Document, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from models.tokenizer import Tokenizer
    from service.eval.policies import NamedPolicy
    from service.eval.session import Answer, Session
    from service.eval.tasks import Task

DRAWS = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True, slots=True)
class Record:
    """One policy in one cell.

    Attributes:
        phase: what ran under the policy; "decode" is the question and the answer.
        n: answers, the same questions for every policy of the cell.
        accuracy: mean share of the references that an answer mentions.
        low, high: 95% interval of the accuracy, bootstrapped by document.
        density, coverage, fallbacks: as in an answer's `sparsity`, means and a sum over answers.
        true_coverage: exact coverage of the audited tokens; None where none was audited.
        coverage_error: mean distance of the estimate from it.
    """

    task: str
    context: int
    policy: str
    phase: str
    n: int
    documents: int
    accuracy: float
    low: float
    high: float
    density: float
    coverage: float | None
    true_coverage: float | None
    coverage_error: float | None
    fallbacks: int


@dataclass(slots=True)
class _Sums:
    scores: list[list[float]] = field(default_factory=list)  # by document
    answers: list[Answer] = field(default_factory=list)


def measure_cell(
    session: Session,
    tokenizer: Tokenizer,
    source: Source,
    task: Task,
    context: int,
    policies: Sequence[NamedPolicy],
    *,
    documents: int,
    questions: int,
    seed: int,
    progress: Callable[[], object],
) -> list[Record]:
    """Ask the task's questions under every policy.

    Args:
        session: with room for `context` tokens.
        tokenizer: the model's.
        source: text to hide facts in.
        task: what to ask.
        context: tokens of a prompt, its question included, or slightly fewer.
        policies: what to compare.
        documents: how many to draw.
        questions: most questions to ask about each.
        seed: of the documents; a task and a context have documents of their own.
        progress: called once a document and policy.
    """
    sums = {policy.name: _Sums() for policy in policies}
    for number in range(documents):
        name = int.from_bytes(task.name.encode()[-8:], "big")
        rng = np.random.default_rng([seed, name, context, number])
        document = task.make(rng, source, context - _reserve(task, tokenizer), questions)
        prompts = [prompt_tokens(tokenizer, document, i) for i in range(len(document.questions))]
        for policy in policies:
            answers = session.answers(prompts, policy.sparsity, task.answer_tokens)
            pairs = zip(document.questions, answers, strict=True)
            sums[policy.name].scores.append([asked.score(answer.text) for asked, answer in pairs])
            sums[policy.name].answers += answers
            progress()
    return [_record(task, context, name, one) for name, one in sums.items()]


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


def _reserve(task: Task, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt that are not the document's: the longest question, and the template."""
    source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False))
    some = task.make(np.random.default_rng(0), source, 2048, 1)
    return len(prompt_tokens(tokenizer, Document("", some.questions), 0)) + 16


def _record(task: Task, context: int, policy: str, sums: _Sums) -> Record:
    answers = sums.answers
    low, high = interval(sums.scores)
    fallbacks: Counter[str] = Counter()
    for answer in answers:
        fallbacks.update(answer.report.fallbacks)
    fallbacks.pop("requested", None)
    exact = np.concatenate([answer.exact for answer in answers])
    estimated = np.concatenate([answer.estimated for answer in answers])
    coverages = [one.report.coverage for one in answers if one.report.coverage is not None]
    return Record(
        task=task.name,
        context=context,
        policy=policy,
        phase="decode",
        n=len(answers),
        documents=len(sums.scores),
        accuracy=float(np.mean([score for scores in sums.scores for score in scores])),
        low=low,
        high=high,
        density=float(np.mean([answer.report.density for answer in answers])),
        coverage=float(np.mean(coverages)) if coverages else None,
        true_coverage=float(exact.mean()) if exact.size else None,
        coverage_error=float(np.abs(estimated - exact).mean()) if exact.size else None,
        fallbacks=fallbacks.total(),
    )


def interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the mean score, bootstrapped over documents (Efron 1979, percentiles).

    Args:
        scores: of each document's answers.
    """
    totals = np.array([sum(one) for one in scores])  # [documents]
    counts = np.array([len(one) for one in scores])  # [documents]
    draws = np.random.default_rng(0).integers(0, len(scores), (DRAWS, len(scores)))
    means = totals[draws].sum(1) / counts[draws].sum(1)  # [DRAWS]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
