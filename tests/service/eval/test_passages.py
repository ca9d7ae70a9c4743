"""Passages end alike in every context, and a repetition repeats."""

from __future__ import annotations

import numpy as np
import pytest

from service.errors import ConfigError
from service.eval import passages
from service.eval.passages import AWAY, REPEATED
from service.eval.source import Source
from service.eval.tasks import TASKS


def encode(text):
    """A number a word."""
    return [int.from_bytes(word.encode()[-6:], "big") for word in text.split()]


def own(sentences):
    return " ".join(f"Sentence {i} says {i * i}." for i in range(sentences))


SOURCES = {"generated": Source(encode), "own": Source(encode, (own(300), own(30_000)))}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(passages, "LONGEST", 9000)


def make(task, context, seed=0, source="generated"):
    return TASKS[task].make(np.random.default_rng(seed), SOURCES[source], context)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("seed", range(3))
def test_every_context_ends_in_the_same_text(source, seed):
    short, middle, long = (make("text", n, seed, source) for n in (1024, 4096, 9000))
    for one, context in ((short, 1024), (middle, 4096), (long, 9000)):
        assert len(one.tokens) == context
        assert one.tokens == long.tokens[-context:]
        assert (one.targets, one.skipped) == (512, 0)
    assert make("text", 1024, seed + 1, source) != short


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("context", [2048, 8192])
def test_a_repetition_stands_before_far_enough_away(source, context):
    depths = []
    for seed in range(12):
        one = make("repeats", context, seed, source)
        assert len(one.tokens) == context and (one.targets, one.skipped) == (64, 6)
        span, before = one.tokens[-REPEATED:], one.tokens[:-REPEATED]
        [first] = [
            i
            for i in range(len(before) - REPEATED + 1)
            if before[i] == span[0] and before[i : i + REPEATED] == span
        ]
        assert len(before) - first >= AWAY
        depths.append(first / (len(before) - AWAY))
    assert min(depths) < 0.35 and max(depths) > 0.65


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="reaches back 9000 tokens"):
        make("text", 10_000)
    with pytest.raises(ConfigError, match="2048 tokens or more"):
        make("repeats", 1024)
    source = Source(encode, (own(400),))
    assert len(TASKS["text"].make(np.random.default_rng(0), source, 1500).tokens) == 1500
    with pytest.raises(ConfigError, match="longer texts"):
        TASKS["text"].make(np.random.default_rng(0), source, 4000)
