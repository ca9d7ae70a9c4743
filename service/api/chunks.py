"""The chunks of a streamed answer as JSON; what all have in common is written once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from service.api.generation import Usage
    from service.api.schemas import StreamOptions
    from service.engine.types import Delta

Json = dict[str, Any]

_MARK = "\0"
"""Stands for a text where the rest of its chunk is written; nothing else in a chunk holds it."""

write = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Pieces(Protocol):
    """How an endpoint writes a delta as a choice of a chunk."""

    def piece(self, delta: Delta) -> Json:
        """The choice."""


class ChunkWriter:
    """Writes the chunks of one answer.

    Args:
        head: the fields that every chunk begins with.
        pieces: the endpoint's.
        usage: counted elsewhere.
        options: what clients ask of a stream.
    """

    def __init__(self, head: Json, pieces: Pieces, usage: Usage, options: StreamOptions) -> None:
        self._head = f"{write(head)[:-1]},"
        self._pieces = pieces
        self._usage = usage
        self._options = options
        self._around: dict[int, tuple[str, str]] = {}  # by choice: a chunk before and behind a text

    def choice(self, choice: Json, report: Json | None = None) -> str:
        """A chunk of one choice, and the report of the whole answer where it ends."""
        fields: Json = {"choices": [choice]}
        if self._options.continuous_usage_stats:
            fields["usage"] = self._usage.as_json()
        elif self._options.include_usage:
            fields["usage"] = None
        return self._chunk(fields | (report or {}))

    def piece(self, delta: Delta, extra: Json, report: Json | None = None) -> str:
        """A delta's chunk; `extra` are more fields of its choice."""
        varied = delta.logprobs or extra or report or self._options.continuous_usage_stats
        if varied or delta.finish_reason is not None:
            return self.choice(self._pieces.piece(delta) | extra, report)
        # Almost every chunk: only its text is its own.
        if delta.index not in self._around:
            marked = self.choice(self._pieces.piece(replace(delta, text=_MARK)))
            before, _, behind = marked.partition(write(_MARK))
            self._around[delta.index] = before, behind
        before, behind = self._around[delta.index]
        return f"{before}{write(delta.text)}{behind}"

    def end(self, report: Json) -> str:
        """The chunk of the usage, without choices."""
        return self._chunk({"choices": [], "usage": self._usage.as_json(), **report})

    def _chunk(self, fields: Json) -> str:
        return f"{self._head}{write(fields)[1:]}"
