"""The results file, which an interrupted evaluation goes on from, and the table."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from service.errors import ConfigError
from service.eval.measure import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

SOLVED = 0.8
"""Dense accuracy under which a cell says nothing about sparsity."""


@dataclass(slots=True)
class Results:
    """Records with what is needed to make them again.

    Attributes:
        command: as it was typed.
        settings: what the records depend on besides the command's cells.
    """

    command: str
    settings: dict[str, Any]
    commit: str
    machine: str
    records: list[Record] = field(default_factory=list)

    @staticmethod
    def start(
        file: Path | None, command: str, settings: dict[str, Any], commit: str | None, machine: str
    ) -> Results:
        """New results, or those of `file` to go on with.

        Raises:
            ConfigError: the file holds something else, or records made with other settings.
        """
        results = Results(command, settings, commit or _commit(), machine)
        if file is None or not file.exists():
            return results
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            records = [Record(**record) for record in saved["records"]]
            same = saved["settings"] == settings
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{file} holds no evaluation: name another --output") from None
        if not same:
            raise ConfigError(
                f"{file} was made with other settings ({saved['settings']}): name another --output "
                "or use the same"
            )
        results.records = records
        return results

    def has(self, task: str, context: int, policies: Sequence[str]) -> bool:
        """Whether a cell is there already, with every policy."""
        found = {r.policy for r in self.records if (r.task, r.context) == (task, context)}
        return found >= set(policies)

    def add(self, records: Sequence[Record]) -> None:
        """Put a cell's records in the place of older ones."""
        cells = {(r.task, r.context) for r in records}
        kept = [r for r in self.records if (r.task, r.context) not in cells]
        self.records = [*kept, *records]

    def save(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        envelope = {
            "command": self.command,
            "commit": self.commit,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": self.machine,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "settings": self.settings,
            "records": [asdict(record) for record in self.records],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(envelope, indent=1) + "\n", encoding="utf-8")
        new.replace(file)


def table(records: Sequence[Record]) -> str:
    """The records as text; cells that dense does not solve stand at the end, on their own."""
    dense = {(r.task, r.context): r.accuracy for r in records if r.policy == "dense"}
    solved = [r for r in records if dense.get((r.task, r.context), 1.0) >= SOLVED]
    lines = [
        f"{'task':<15} {'context':>7}  {'policy':<30} {'answers':>7} {'accuracy':>8} "
        f"{'95% interval':>15} {'density':>8} {'coverage':>9} {'exact':>6} {'error':>6} "
        f"{'fallbacks':>9}",
        *map(_line, solved),
    ]
    unsolved = [r for r in records if r not in solved]
    if unsolved:
        lines += [
            f"Under dense attention the model answers fewer than {SOLVED:.0%} of these: what "
            "sparsity costs cannot be judged there.",
            *(_line(r) for r in unsolved if r.policy == "dense"),
        ]
    return "\n".join(lines)


def _line(r: Record) -> str:
    exact, error, coverage = (
        "" if value is None else f"{value:.3f}"
        for value in (r.true_coverage, r.coverage_error, r.coverage)
    )
    span = f"{r.low:.3f} to {r.high:.3f}"
    return (
        f"{r.task:<15} {r.context:>7}  {r.policy:<30} {r.n:>7} {r.accuracy:>8.3f} {span:>15} "
        f"{r.density:>8.1%} {coverage:>9} {exact:>6} {error:>6} {r.fallbacks:>9}"
    )


def _commit() -> str:
    """The commit that the sources stand at; "unknown" outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
