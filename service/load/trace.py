"""Traces of requests in Mooncake's form: a line of JSON each, with the time and both lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 512
"""Tokens that one of a trace's `hash_ids` stands for."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One line.

    Attributes:
        at: seconds since the trace's first request.
        input_tokens, output_tokens: at least 1.
        blocks: `hash_ids`: equal ids stand for equal blocks of `BLOCK` prompt tokens; may be empty.
    """

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_trace(file: Path) -> list[TracedRequest]:
    """The requests of a trace, in order of time.

    Each line is `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`; the
    last may be absent (Qin et al. 2024, "Mooncake").

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is wrong; names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"cannot read the trace {file}: {reason}") from None
    rows = [
        _row(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not rows:
        raise ConfigError(f"the trace {file} holds no request")
    rows.sort(key=lambda row: row.at)
    first = rows[0].at
    return [
        TracedRequest(row.at - first, row.input_tokens, row.output_tokens, row.blocks)
        for row in rows
    ]


def _row(line: str, where: str) -> TracedRequest:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not a JSON object")
    time: Any = values.get("timestamp")
    if type(time) not in (int, float) or not 0 <= time < 1e15:
        raise ConfigError(f"{where}: timestamp must be milliseconds, from 0")
    blocks = values.get("hash_ids") or []
    if not isinstance(blocks, list) or {type(one) for one in blocks} - {int}:
        raise ConfigError(f"{where}: hash_ids must be a list of whole numbers")
    return TracedRequest(
        time / 1000,
        _length(values, "input_length", where),
        _length(values, "output_length", where),
        tuple(blocks),
    )


def _length(values: dict[str, Any], field: str, where: str) -> int:
    tokens = values.get(field)
    if type(tokens) is not int or not 1 <= tokens < 10**9:
        raise ConfigError(f"{where}: {field} must be a whole number of tokens, from 1")
    return tokens
