"""The results file, which an interrupted evaluation goes on from, and the table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from service.envelope import current_commit, envelope
from service.errors import ConfigError
from service.eval.record import SOLVED, Pooled, Record, pooled, solved
from service.eval.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from service.eval.cell import Cell


SELECTIONS = "selections"
"""Among the settings of a file: of each policy by name."""


@dataclass(slots=True)
class Results:
    """Records with what is needed to make them again.

    Attributes:
        command: as it was typed, the last time.
        settings: what the records depend on besides their cell, the commit and the machine.
        selections: what decides which keys are read, by policy (`kernels.fingerprint`).
        commit, machine: of this run; every record keeps its own.
    """

    command: str
    settings: dict[str, Any]
    commit: str
    machine: str
    records: list[Record] = field(default_factory=list)
    selections: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def start(
        file: Path | None,
        command: str,
        settings: dict[str, Any],
        commit: str | None,
        machine: str,
        selections: Mapping[str, Any] | None = None,
    ) -> Results:
        """New results, or those of `file` to go on with.

        Raises:
            ConfigError: the file holds something else, or records made with other settings, or
                under a policy of the same name that selects otherwise.
        """
        results = Results(command, settings, commit or current_commit(), machine)
        results.selections = dict(selections or {})
        if file is None or not file.exists():
            return results
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            records = [Record(**record) for record in saved["records"]]
            given = dict(saved["settings"])
            selected = given.pop(SELECTIONS)
            same = given == settings and all(
                results.selections.get(name, one) == one for name, one in selected.items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{file} holds no evaluation: name another --output") from None
        if not same:
            raise ConfigError(
                f"{file} was made with other settings ({saved['settings']}): name another --output "
                "or use the same"
            )
        results.records = records
        results.selections = selected | results.selections
        return results

    def has(self, cell: Cell) -> bool:
        """Whether a cell is there already: every policy, on as many documents, beside dense."""
        wanted = {policy.name for policy in cell.policies}
        found = {
            r.policy
            for r in self.records
            if (r.task, r.context, r.documents, r.own_text)
            == (cell.task, cell.context, cell.documents, cell.own_text)
            and r.scores
            and (r.loss is not None or r.policy == "dense" or "dense" not in wanted)
        }
        return found >= wanted

    def add(self, records: Sequence[Record]) -> None:
        """Put records in the place of older ones; the order is always the same.

        Of a cell's other policies those stay that were measured on other documents, and not beside
        a dense record that is replaced.
        """
        replaced = {(r.task, r.context, r.policy) for r in records}
        denser = {(r.task, r.context) for r in records if r.policy == "dense"}
        kept = [
            r
            for r in self.records
            if (r.task, r.context, r.policy) not in replaced
            and not (r.loss is not None and (r.task, r.context) in denser)
        ]
        order = {name: number for number, name in enumerate(TASKS)}
        made = [replace(r, commit=self.commit, machine=self.machine) for r in records]
        self.records = sorted(
            [*kept, *made], key=lambda r: (r.context, order.get(r.task, len(order)), r.task)
        )

    def save(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        settings = self.settings | {SELECTIONS: self.selections}
        head = envelope(self.command, self.commit, self.machine, settings)
        # A row a line, so that scores do not take thousands of them.
        text = json.dumps(head, indent=1).removesuffix("\n}")
        for name, rows in (("pooled", pooled(self.records)), ("records", self.records)):
            lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
            text += f',\n "{name}": [\n{lines}\n ]'
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(file.name + ".new")
        new.write_text(text + "\n}\n", encoding="utf-8")
        new.replace(file)


def table(records: Sequence[Record]) -> str:
    """The records as text; cells that dense does not solve stand at the end, on their own."""
    good = solved(records)
    asked = [r for r in records if r.accuracy is not None]
    kept = [r for r in asked if (r.task, r.context) in good]
    unsolved = [r for r in asked if (r.task, r.context) not in good and r.policy == "dense"]
    passages = [r for r in records if r.bits_per_byte is not None]
    lines = [_head("accuracy"), *map(_line, kept)] if asked else []
    if passages:
        lines += [_head("bits/byte"), *map(_line, passages)]
    together = pooled(records)
    if together:
        lines += [
            f"Over the tasks of which dense attention answers {SOLVED:.0%} and more, against dense "
            "on the same questions:",
            f"{'context':>7}  {'policy':<30} {'answers':>7} {'documents':>9} {'dense':>6} "
            f"{'accuracy':>8} {'loss':>7} {'95% interval':>16} {'density':>8}  tasks",
            *map(_pooled_line, together),
        ]
    if unsolved:
        lines += [
            f"Under dense attention the model answers fewer than {SOLVED:.0%} of these: what "
            "sparsity costs cannot be judged there.",
            *map(_line, unsolved),
        ]
    return "\n".join(lines)


def _head(measure: str) -> str:
    return (
        f"{'task':<15} {'context':>7}  {'policy':<30} {'answers':>7} {measure:>9} "
        f"{'95% interval':>15} {'loss':>7} {'95% interval':>16} {'density':>8} {'coverage':>9} "
        f"{'exact':>6} {'error':>6} {'constant':>8} {'too high':>8} {'fallbacks':>9}"
    )


def _line(r: Record) -> str:
    exact, error, constant, coverage, loss = (
        "" if value is None else f"{value:.3f}"
        for value in (r.true_coverage, r.coverage_error, r.constant_error, r.coverage, r.loss)
    )
    over = "" if r.overestimates is None else f"{r.overestimates:.1%}"
    value = r.bits_per_byte if r.accuracy is None else r.accuracy
    span = f"{r.low:.3f} to {r.high:.3f}"
    return (
        f"{r.task:<15} {r.context:>7}  {r.policy:<30} {r.n:>7} {value:>9.3f} {span:>15} "
        f"{loss:>7} {_span(r.loss_low, r.loss_high):>16} {r.density:>8.1%} {coverage:>9} "
        f"{exact:>6} {error:>6} {constant:>8} {over:>8} {r.fallbacks:>9}"
    )


def _pooled_line(row: Pooled) -> str:
    return (
        f"{row.context:>7}  {row.policy:<30} {row.n:>7} {row.documents:>9} {row.dense:>6.3f} "
        f"{row.accuracy:>8.3f} {row.loss:>7.3f} {_span(row.loss_low, row.loss_high):>16} "
        f"{row.density:>8.1%}  {', '.join(row.tasks)}"
    )


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
