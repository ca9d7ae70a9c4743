"""Server-sent events, from bytes as they come to the JSON of an answer's chunks."""

from __future__ import annotations

import json
from typing import Any

DONE = b"[DONE]"


class EventReader:
    """Splits a stream into events; pieces may be cut anywhere.

    Only what OpenAI's protocol uses: `data` fields, ended by an empty line. Comments and other
    fields are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that `piece` completes."""
        self._rest += piece
        if b"\r" in self._rest:
            # A carriage return at the end may be half of a line's end.
            kept = b"\r" if self._rest.endswith(b"\r") else b""
            self._rest = self._rest.removesuffix(b"\r").replace(b"\r\n", b"\n") + kept
        *events, self._rest = self._rest.split(b"\n\n")
        return [data for data in map(_data, events) if data is not None]


def _data(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line[:5] == b"data:"]
    return b"\n".join(lines) if lines else None


def carries_tokens(chunk: dict[str, Any]) -> bool:
    """Whether a chunk brings tokens, and not just a role, an end or the usage.

    Bytes that are no character yet are a token without text.
    """
    choices = chunk.get("choices")
    if not choices:
        return False
    choice = choices[0]
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
        return True
    opening = "role" in delta or delta.get("content") is None
    return not opening and choice.get("finish_reason") is None


def parse(data: bytes) -> dict[str, Any]:
    """A chunk.

    Raises:
        ValueError: it is not a JSON object.
    """
    chunk = json.loads(data)
    if not isinstance(chunk, dict):
        raise ValueError("an event is not a JSON object")
    return chunk
