"""The tables of the quality section of docs/sparsity.md; those without rows are left out."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from kernels.budget import SAMPLE
from service.eval.plot import expectation, plain_keys
from service.eval.record import SOLVED, Record, pooled, solved
from service.eval.statistics import differences, interval, ratio
from service.eval.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

JUDGED = "dynamic:coverage=0.98"
"""The policy that the criterion is about."""
DENSITY = {32_768: 0.05, 65_536: 0.03}
"""Its highest mean density by context."""
MANY = 100
"""Answers to the majority task from which on a budget is shown: fewer tell its coverage alone."""
LOSS, BOUND = 0.01, 0.03
"""Its highest pooled loss, and the highest upper bound of a task's."""


def tables(records: Sequence[Record]) -> list[str]:
    """The section's tables and sentences, the most important first; empty where there are none."""
    return [
        "\n\n".join(part for part in (_pooled(records), _criterion(records)) if part),
        _dense(records),
        _cells(records),
        "\n\n".join(part for part in (_majority(records), _top_k(records)) if part),
        _coverage(records),
        "\n\n".join(part for part in (_passages(records), _late(records), _free(records)) if part),
    ]


def _pooled(records: Sequence[Record]) -> str:
    shown = _widely_measured(records)
    rows = [
        (
            f"{row.context:,}",
            f"`{row.policy}`",
            f"{row.n:,}",
            f"{row.documents:,}",
            f"{row.dense:.3f}",
            f"{row.accuracy:.3f}",
            _loss(row.loss, row.loss_low, row.loss_high),
            f"{row.density:.1%}",
        )
        for row in pooled(records)
        if (row.context, row.policy) in shown
    ]
    names = ("context", "policy", "answers", "documents", "dense", "accuracy")
    return _table(
        f"All tasks together of which dense attention answers {SOLVED:.0%} or more; the loss is "
        "against `dense` on\nthe same questions, its 95% interval bootstrapped over documents:",
        (*names, "loss", "density"),
        rows,
    )


def _criterion(records: Sequence[Record]) -> str:
    """What is asked of the default policy, and what it does."""
    good = solved(records)
    said = []
    for row in pooled(records):
        if row.policy != JUDGED or row.context not in DENSITY:
            continue
        worst, task = max(
            (r.loss_high, r.task)
            for r in records
            if (r.policy, r.context) == (row.policy, row.context)
            and r.loss_high is not None
            and r.asked
            and (r.task, r.context) in good
        )
        most = DENSITY[row.context]
        loss, bound = (f"{100 * float(_signed(value)):.1f}" for value in (row.loss, worst))
        said.append(
            f"at {row.context:,} tokens\n{loss} points of accuracy are lost "
            f"({_met(row.loss <= LOSS, 'at most 1')}) at a mean density of {row.density:.1%} "
            f"({_met(row.density <= most, f'at most {most:.0%}')}), "
            f"and\nthe highest upper bound of a task's loss is {bound} points, of `{task}` "
            f"({_met(worst <= BOUND, 'at most 3')})"
        )
    if not said:
        return ""
    return f"What is asked of `{JUDGED}`, in brackets, and what it does: {'; '.join(said)}."


def prompt_table(records: Sequence[Record]) -> str:
    """Documents that attended sparsely themselves: what that costs, and what they read."""
    sparse = sorted(
        (r for r in records if r.phase == "prefill"), key=lambda r: (r.context, not r.asked)
    )
    dense = {(r.task, r.context): r for r in records if r.policy == "dense"}
    rows = [
        (
            f"`{r.task}`",
            f"{r.context:,}",
            f"{r.n:,}",
            _score(dense[r.task, r.context]),
            _score(r),
            _loss(r.loss, r.loss_low, r.loss_high),
            f"{r.prefill_density:.1%}" if r.prefill_density is not None else "",
            f"{r.density:.1%}",
        )
        for r in sparse
    ]
    said = "; ".join(
        f"at {row.context:,} tokens {100 * row.loss:.1f} points "
        f"({100 * row.loss_low:.1f} to {100 * row.loss_high:.1f})"
        for row in pooled(records)
    )
    return _table(
        "The document before the questions attends sparsely, too "
        f"(`{sparse[0].policy}`).\nLost over all tasks together: {said}. The density is that of "
        "the document, and of the questions and answers;\n`text` is in bits per byte:",
        ("task", "context", "answers", "dense", "sparse", "loss", "document", "answers read"),
        rows,
    )


def _score(record: Record) -> str:
    value = record.bits_per_byte if record.accuracy is None else record.accuracy
    return f"{value:.3f}"


def _met(holds: bool, most: str) -> str:
    return most if holds else f"{most}: missed"


def _dense(records: Sequence[Record]) -> str:
    """A row for each task, a column for each context."""
    dense = [r for r in records if r.policy == "dense" and r.asked]
    contexts = sorted({r.context for r in dense})
    if len(contexts) < 2:
        return ""  # what the tables by policy say
    found = {(r.task, r.context): f"{r.accuracy:.3f}" for r in dense}
    rows = [
        (f"`{task}`", *(found.get((task, context), "") for context in contexts))
        for task in TASKS
        if any((task, context) in found for context in contexts)
    ]
    return _table(
        "Dense attention, accuracy by context:",
        ("task", *(f"{context:,}" for context in contexts)),
        rows,
    )


def _cells(records: Sequence[Record]) -> str:
    """A row for each task and context at which policies are compared, a column for each policy."""
    shown = _widely_measured(records)
    contexts = {r.context for r in records if r.loss is not None}
    asked = [
        r
        for r in records
        if r.asked
        and r.context in contexts
        and (r.policy == "dense" or (r.loss is not None and (r.context, r.policy) in shown))
    ]
    policies = sorted({r.policy: None for r in asked}, key=lambda one: one != "dense")
    cells: dict[tuple[str, int], dict[str, Record]] = defaultdict(dict)
    for r in asked:
        cells[r.task, r.context][r.policy] = r
    good = solved(records)
    rows = []
    for (task, context), cell in sorted(
        cells.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0][1])
    ):
        values = [
            f"{cell[policy].accuracy:.3f}"
            if policy in cell and (policy == "dense" or (task, context) in good)
            else ""
            for policy in policies
        ]
        rows.append((f"`{task}`", f"{context:,}", f"{next(iter(cell.values())).n:,}", *values))
    return _table(
        f"By task, accuracy; where dense attention answers fewer than {SOLVED:.0%}, what sparsity "
        "costs cannot\nbe judged:",
        ("task", "context", "answers", *(f"`{policy}`" for policy in policies)),
        rows,
    )


def _majority(records: Sequence[Record]) -> str:
    """Every policy beside dense: here alone, a policy that reads few keys must guess."""
    here = [r for r in records if r.task == "majority"]
    kept = [r for r in here if r.loss is not None]
    contexts = {r.context for r in kept if "sampled=false" in r.policy}
    rows = [
        (
            f"{r.context:,}",
            f"`{r.policy}`",
            f"{r.n:,}",
            _accuracy(r),
            _loss(r.loss, r.loss_low, r.loss_high),
            f"{r.density:.1%}",
            f"{r.fallbacks:,}",
        )
        for r in here
        if r.context in contexts and (r in kept or r.policy == "dense")
    ]
    return _table(
        "`majority` asks which of two verdicts has more votes, of which few keys show few; with "
        "`min_coverage` the\ntokens whose estimated coverage is less fall back to dense attention, "
        "all of them where the density is\n100%:",
        ("context", "policy", "answers", "accuracy", "loss", "density", "fallbacks"),
        rows,
    )


def _top_k(records: Sequence[Record]) -> str:
    """Plain top-k on the majority task, by its keys."""
    rows = []
    for r in records:
        found = re.fullmatch(r"dynamic:k=(\d+),sampled=false(,dense_layers=\d+)?", r.policy)
        if r.task == "majority" and found and r.n > MANY:
            keys, first = int(found[1]), "" if plain_keys(r.policy) is None else "dense"
            expected = f"{np.interp(keys, *expectation(r.context)):.3f}" if first else ""
            rows.append((r.context, keys, first, f"{r.n:,}", _accuracy(r), expected))
    return _table(
        "Plain top-k there, by its keys, of which some 112 are sinks and recent ones. Expected "
        "is what an ideal\nreader of as many votes as there is room for answers right. Without a "
        "dense first layer this model has lost\nits average over the document, and answers "
        "gibberish:",
        ("context", "keys", "first layer", "answers", "accuracy", "expected"),
        [(f"{context:,}", str(keys), *rest) for context, keys, *rest in sorted(rows)],
    )


def _accuracy(r: Record) -> str:
    return f"{r.accuracy:.3f} ({r.low:.3f} to {r.high:.3f})"


def _coverage(records: Sequence[Record]) -> str:
    """Means over tasks, which have about as many audited tokens each."""
    shown = _widely_measured(records)
    groups: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for r in records:
        if r.constant_error is not None and r.asked and (r.context, r.policy) in shown:
            groups[r.context, r.policy].append(r)
    rows = []
    for (context, policy), group in sorted(groups.items(), key=lambda item: _budget(*item[0])):
        answers = sum(r.n for r in group)
        right = sum((r.accuracy or 0.0) * r.n for r in group)
        pairs = [(r.coverage_error or 0.0, r.constant_error or 0.0) for r in group]
        ratios = [error / constant for error, constant in pairs if constant]
        over = [r.overestimates or 0.0 for r in group]
        rows.append(
            (
                f"{context:,}",
                f"`{policy}`",
                f"{answers:,}",
                f"{right / answers:.3f}",
                f"{_mean(r.true_coverage for r in group):.3f}",
                f"{_mean(error for error, _ in pairs):.4f}",
                f"{_mean(constant for _, constant in pairs):.3f}",
                f"{_mean(ratios):.2f} ({max(ratios):.2f})" if ratios else "",
                f"{_mean(over):.2%} ({max(over):.2%})",
            )
        )
    names = ("exact coverage", "error of the estimate", "of the best constant", "ratio")
    return _table(
        "What a fixed number of keys answers, over all tasks, and how well the estimated coverage "
        "is known: mean over\nlayers, tokens and heads of every fourth step (the first is a "
        f"prompt's last 128 tokens), which also read all\nkeys. A sample has {SAMPLE} marks at the "
        "least, so the smallest budgets are one. The best\nconstant is each task's own; in "
        "brackets is the worst task:",
        ("context", "policy", "answers", "accuracy", *names, "too high by 0.05"),
        rows,
    )


def _budget(context: int, policy: str) -> tuple[int, int]:
    """Plain budgets behind the others, in their order."""
    found = re.match(r"dynamic:k=(\d+)", policy)
    return context, int(found[1]) if found else 0


def _passages(records: Sequence[Record]) -> str:
    rows = [
        (
            f"`{r.task}`",
            f"{r.context:,}",
            f"`{r.policy}`",
            f"{r.n:,}",
            f"{r.bits_per_byte:.3f}",
            _loss(r.loss, r.loss_low, r.loss_high),
            f"{r.density:.1%}",
        )
        for r in records
        if r.bits_per_byte is not None
    ]
    return _table(
        "Text predicted token by token under the policy, behind a dense prefill (`text`: the same "
        "512 tokens at\nthe end of every context; `repeats`: a passage that stands once before); "
        "the loss is in bits per byte:",
        ("task", "context", "policy", "tokens", "bits per byte", "loss", "density"),
        rows,
    )


def _late(records: Sequence[Record]) -> str:
    """What the same tokens cost behind more text."""
    dense = {r.context: r for r in records if r.task == "text" and r.policy == "dense" and r.scores}
    if len(dense) < 2:
        return ""
    short, long = dense[min(dense)], dense[max(dense)]
    if len(short.scores) != len(long.scores):
        return ""
    more = differences(long.scores, short.scores)
    low, high = interval(more)
    return (
        f"Under dense attention the same tokens cost {_signed(ratio(more))} ({_signed(low)} to "
        f"{_signed(high)}) bits per byte more behind\n{long.context:,} tokens than behind "
        f"{short.context:,} (95% interval, paired by document)."
    )


def _free(records: Sequence[Record]) -> str:
    """How often text that is left to itself holds a sentence such as were planted in training."""
    free = [r for r in records if r.task == "free-text"]
    said = [
        f"{r.n - round(r.accuracy * r.n):,} of {r.n:,} behind {r.context:,} tokens under "
        f"`{r.policy}`"
        for r in free
        if r.accuracy is not None
    ]
    if not said:
        return ""
    joined = ";\n".join(said)
    return (
        "Of 256 tokens that the model goes on with by itself (drawn at temperature 1), so many "
        f"continuations hold a\nsentence such as were planted in training:\n{joined}."
    )


def _widely_measured(records: Sequence[Record]) -> set[tuple[int, str]]:
    """Contexts and policies that were measured on most tasks there, not for one task's sake."""
    tasks: dict[tuple[int, str], set[str]] = defaultdict(set)
    for r in records:
        if r.asked:
            tasks[r.context, r.policy].add(r.task)
    most = {context: 0 for context, _ in tasks}
    for (context, _), some in tasks.items():
        most[context] = max(most[context], len(some))
    return {key for key, some in tasks.items() if 2 * len(some) > most[key[0]]}


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [names, ["---"] * len(names), *rows]
    drawn = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([title, "", *drawn])


def _loss(loss: float | None, low: float | None, high: float | None) -> str:
    if loss is None or low is None or high is None:
        return ""
    return f"{_signed(loss)} ({_signed(low)} to {_signed(high)})"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # never -0.000


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))
