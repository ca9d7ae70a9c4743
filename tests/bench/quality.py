"""Writes the README's quality section, and its plot, from the evaluation's results file.

python tests/bench/quality.py           # README.md and tests/bench/results/quality.svg
python tests/bench/quality.py --check   # 1 when README.md is not what would be written
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.eval.plot import draw  # noqa: E402  (the script also runs uninstalled)
from service.eval.record import SOLVED, Record, pooled, solved  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

README = ROOT / "README.md"
RESULTS = ROOT / "tests/bench/results/quality.json"
PLOT = RESULTS.with_suffix(".svg")
BEGIN = "<!-- quality: written by tests/bench/quality.py -->"
END = "<!-- end of quality -->"
UNTOLD = ("--output", "--commit", "--plot")  # options that say nothing about the numbers


def section(saved: dict[str, Any]) -> str:
    """The section's text, markers not included; tables without rows are left out."""
    records = [Record(**record) for record in saved["records"]]
    settings, torch = saved["settings"], saved["versions"]["torch"]
    parts = [
        _pooled(records),
        f"![Accuracy against density]({PLOT.relative_to(ROOT).as_posix()})",
        _cells(records),
        _passages(records),
        _coverage(records),
        f"```sh\n{_command(saved['command'])}\n```",
        f"({saved['machine']}, torch {torch}, commit {saved['commit']}, {saved['date']}, seed "
        f"{settings['seed']}; every row, with its interval:\n"
        f"[{RESULTS.name}]({RESULTS.relative_to(ROOT).as_posix()}).)",
    ]
    return "\n\n".join(part for part in parts if part)


def rendered(readme: str, saved: dict[str, Any]) -> str:
    """The README with its section anew.

    Raises:
        SystemExit: the README has no markers.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"README.md must hold the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{section(saved)}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; 0 when the README is what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    saved = json.loads(RESULTS.read_text(encoding="utf-8"))
    readme = README.read_text(encoding="utf-8")
    wanted = rendered(readme, saved)
    if options.check:
        if wanted != readme:
            print("README.md is not what the results say: run python tests/bench/quality.py")
        return int(wanted != readme)
    README.write_text(wanted, encoding="utf-8")
    draw([Record(**record) for record in saved["records"]], PLOT)
    return 0


def _pooled(records: Sequence[Record]) -> str:
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
    ]
    names = ("context", "policy", "answers", "documents", "dense", "accuracy")
    return _table(
        f"All tasks together of which dense attention answers {SOLVED:.0%} or more; the loss is "
        "against `dense` on\nthe same questions, its 95% interval bootstrapped over documents:",
        (*names, "loss", "density"),
        rows,
    )


def _cells(records: Sequence[Record]) -> str:
    """A row for each task and context, a column for each policy."""
    asked = [r for r in records if r.accuracy is not None]
    policies = sorted({r.policy: None for r in asked}, key=lambda one: one != "dense")
    cells: dict[tuple[str, int], dict[str, Record]] = defaultdict(dict)
    for r in asked:
        cells[r.task, r.context][r.policy] = r
    good = solved(records)
    rows = []
    for (task, context), cell in sorted(
        cells.items(), key=lambda item: (_place(asked, item[0][0]), item[0][1])
    ):
        shown = [
            f"{cell[policy].accuracy:.3f}"
            if policy in cell and (policy == "dense" or (task, context) in good)
            else ""
            for policy in policies
        ]
        rows.append((f"`{task}`", f"{context:,}", f"{next(iter(cell.values())).n:,}", *shown))
    return _table(
        f"By task, accuracy; where dense attention answers fewer than {SOLVED:.0%}, what sparsity "
        "costs cannot\nbe judged:",
        ("task", "context", "answers", *(f"`{policy}`" for policy in policies)),
        rows,
    )


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


def _coverage(records: Sequence[Record]) -> str:
    """Means over tasks, which have about as many audited tokens each."""
    groups: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for r in records:
        if r.constant_error is not None:
            groups[r.context, r.policy].append(r)
    rows = [
        (
            f"{context:,}",
            f"`{policy}`",
            _mean((r.true_coverage for r in group), ".3f"),
            _mean((r.coverage_error for r in group), ".4f"),
            _mean((r.constant_error for r in group), ".3f"),
            _mean((r.overestimates for r in group), ".1%"),
        )
        for (context, policy), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    names = ("exact coverage", "error of the estimate", "of the best constant", "too high by 0.05")
    return _table(
        "How well the estimated coverage is known, mean over layers, tokens and heads of every "
        "fourth step, which\nalso read all keys:",
        ("context", "policy", *names),
        rows,
    )


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [names, ["---"] * len(names), *rows]
    drawn = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([title, "", *drawn])


def _place(records: Sequence[Record], task: str) -> int:
    return next(i for i, r in enumerate(records) if r.task == task)


def _loss(loss: float | None, low: float | None, high: float | None) -> str:
    if loss is None or low is None or high is None:
        return ""
    return f"{_signed(loss)} ({_signed(low)} to {_signed(high)})"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # never -0.000


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(float(np.mean(known)), form) if known else ""


def _command(typed: str) -> str:
    words = shlex.split(typed)
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before in UNTOLD or word in UNTOLD or word.partition("=")[0] in UNTOLD:
            continue
        kept.append(word)
    return shlex.join(kept)


if __name__ == "__main__":
    sys.exit(main())
