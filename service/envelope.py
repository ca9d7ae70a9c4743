"""What a results file says of how its records were made."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import DataclassInstance


def envelope(command: str, commit: str, machine: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What stands in front of the records.

    Args:
        command: as it was typed.
        commit: that the sources stand at.
        machine: its name.
        settings: what the records depend on besides.
    """
    return {
        "command": command,
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": settings,
    }


def current_commit() -> str:
    """The commit that the sources stand at; "unknown" outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def as_json(head: dict[str, Any], records: Sequence[DataclassInstance]) -> str:
    """A results file: what `head` says, and the records, one a line."""
    lines = ",\n".join(f"  {json.dumps(asdict(record))}" for record in records)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{text},\n "records": [\n{lines}\n ]\n}}\n'
