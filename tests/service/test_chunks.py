"""A chunk written quickly is the chunk that JSON writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.chunks import ChunkWriter
from service.api.generation import Usage
from service.api.schemas import StreamOptions
from service.engine.types import TokenLogprob
from tests.service.fake import delta

HEAD = {"id": 'a"b', "object": "chunk", "created": 1, "model": "é\\", "system_fingerprint": "f"}


class Pieces:
    """Choices that show every field of their delta."""

    def piece(self, delta):
        return {
            "index": delta.index,
            "delta": {"content": delta.text},
            "logprobs": [entry.token for entry in delta.logprobs] or None,
            "finish_reason": delta.finish_reason,
        }


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.lists(st.tuples(texts, st.integers(0, 2), st.booleans(), st.booleans()), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_every_chunk_says_what_it_is_of(tokens, include, continuous):
    usage = Usage(7)
    options = StreamOptions(include_usage=include, continuous_usage_stats=continuous)
    writer = ChunkWriter(HEAD, Pieces(), usage, options)
    for text, index, ranked, last in tokens:
        usage.completion_tokens += 1
        logprobs = (TokenLogprob(1, text, -1.0, ()),) if ranked else ()
        one = replace(delta(text, index, "stop" if last else None), logprobs=logprobs)
        extra = {"attended": 1} if ranked else {}
        expected = HEAD | {"choices": [Pieces().piece(one) | extra]}
        if include or continuous:
            expected["usage"] = usage.as_json() if continuous else None
        report = {"sparsity": 2} if last else None
        written = writer.piece(one, extra, report)
        assert json.loads(written) == expected | (report or {})
        assert list(json.loads(written)) == [*expected, *(report or {})]
        assert "\n" not in written  # a line's end would end the event


@pytest.mark.parametrize("text", ["\0", '"\0"', '\\u0000"', "\n\n", "\u2028", ""])
def test_a_text_that_looks_like_what_stands_for_a_text(text):
    writer = ChunkWriter(HEAD, Pieces(), Usage(1), StreamOptions())
    for _ in range(2):
        written = writer.piece(delta(text), {})
        assert json.loads(written)["choices"][0]["delta"]["content"] == text
