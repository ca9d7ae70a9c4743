"""The evaluation's answers are the engine's; its statistics and files are sound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.loader import load
from models.tokenizer import Tokenizer
from service.config import BUNDLED_CHECKPOINT, SparsityConfig
from service.errors import ConfigError, GenerationError
from service.eval.measure import Record, interval, measure_cell, prompt_tokens
from service.eval.policies import parse_policy
from service.eval.results import Results, table
from service.eval.session import Session
from service.eval.tasks import TASKS, Source
from tests.service.engine.tiny import (
    dynamic,
    greedy,
    letters,
    prompt_of,
    text_of,
    tiny_config,
)

DENSE = dynamic(policy="dense")
FIXED = dynamic(policy="fixed")


@pytest.mark.parametrize("sparsity", [dynamic(), dynamic(min_coverage=0.9), DENSE, FIXED])
def test_answers_and_reports_are_those_of_the_engine(harness, sparsity):
    one = harness()
    document = prompt_of(700, 1)
    prompts = [document + prompt_of(n, n) for n in (30, 150, 31)]
    session = Session(one.decoder, tiny_config(), letters(), tokens=800, together=2)
    answers = session.answers(prompts, sparsity, 9)
    ends = tiny_config().eos_ids
    for prompt, answer in zip(prompts, answers, strict=True):
        [deltas] = one.run(one.generate(prompt, greedy(9, ignore_eos=not ends), sparsity))
        report = deltas[-1].sparsity
        assert answer.text.startswith(text_of(deltas))
        assert answer.report.density == pytest.approx(report.density)
        assert answer.report.coverage == pytest.approx(report.coverage)
        assert answer.report.fallbacks == report.fallbacks


def test_audited_tokens_have_their_exact_coverage(harness):
    one = harness()
    session = Session(one.decoder, tiny_config(), letters(), tokens=800)
    [answer] = session.answers([prompt_of(700)], dynamic(), 9)
    assert len(answer.exact) == len(answer.estimated) > 128
    np.testing.assert_allclose(answer.exact, answer.estimated, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", {"policy": "dense"}),
        (" dynamic ", {"policy": "dynamic", "max_keys": 1024}),
        ("dynamic:k=512", {"min_keys": 512, "max_keys": 512, "coverage": 1.0}),
        ("dynamic:coverage=0.9,max_keys=700", {"coverage": 0.9, "max_keys": 700, "min_keys": 256}),
        ("fixed:sinks:16+window:64", {"policy": "fixed", "pattern": "sinks:16+window:64"}),
        ("fixed", {"policy": "fixed", "pattern": "sinks:16+window:1024"}),
    ],
)
def test_policies_are_read(text, expected):
    policy = parse_policy(text, SparsityConfig())
    assert policy.name == text.strip()
    for field, value in expected.items():
        assert getattr(policy.sparsity, field) == value


@pytest.mark.parametrize(
    "text", ["", "sparse", "dense:1", "dynamic:k=x", "dynamic:keys=3", "dynamic:k=5", "fixed:w:3"]
)
def test_what_is_no_policy_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match="cannot read the policy") as caught:
        parse_policy(text, SparsityConfig())
    assert "\n" not in str(caught.value)


def test_an_interval_holds_the_mean_and_narrows_with_documents():
    rng = np.random.default_rng(1)
    few, many = (rng.random((n, 5)).round().tolist() for n in (10, 400))
    for scores in (few, many):
        low, high = interval(scores)
        assert 0 <= low <= np.mean(scores) <= high <= 1
    assert np.subtract(*interval(many)) > np.subtract(*interval(few))
    assert interval([[1.0], [1.0, 1.0]]) == (1.0, 1.0)


def record(**changes):
    fields = {"task": "needles", "context": 4096, "policy": "dense", "phase": "decode", "n": 9}
    fields |= {"documents": 3, "accuracy": 1.0, "low": 1.0, "high": 1.0, "density": 1.0}
    fields |= {"coverage": 1.0, "true_coverage": None, "coverage_error": None, "fallbacks": 0}
    return Record(**(fields | changes))


def test_an_evaluation_goes_on_where_its_file_stops(tmp_path):
    file, settings = tmp_path / "out" / "q.json", {"seed": 1}
    first = Results.start(file, "saccade eval", settings, "abc", "cpu")
    first.add([record(), record(policy="dynamic")])
    first.save(file)
    envelope = json.loads(file.read_text())
    assert {"command", "commit", "date", "machine", "versions", "records"} <= set(envelope)
    again = Results.start(file, "saccade eval", settings, "abc", "cpu")
    assert again.records == first.records
    assert again.has("needles", 4096, ["dense", "dynamic"])
    assert not again.has("needles", 4096, ["dense", "fixed"])
    assert not again.has("needles", 8192, ["dense"])
    with pytest.raises(ConfigError, match="other settings"):
        Results.start(file, "saccade eval", {"seed": 2}, "abc", "cpu")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no evaluation"):
        Results.start(file, "saccade eval", settings, "abc", "cpu")


def test_what_dense_cannot_answer_stands_apart():
    lines = table(
        [
            record(task="hard", accuracy=0.3),
            record(task="hard", policy="dynamic", accuracy=0.2),
            record(),
            record(policy="dynamic", accuracy=0.9),
        ]
    ).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["needles", "needles"]
    assert "cannot be judged" in lines[3]
    assert lines[4].split()[0] == "hard" and len(lines) == 5


def test_the_bundled_checkpoint_keeps_its_answers_under_the_default_policy():
    tokenizer = Tokenizer.from_folder(BUNDLED_CHECKPOINT)
    decoder, config = load(BUNDLED_CHECKPOINT, "auto", "cpu")
    session = Session(decoder, config, tokenizer, tokens=4096)
    source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False))
    policies = [
        parse_policy(text, SparsityConfig())
        for text in ("dense", "dynamic", "fixed:sinks:16+window:512")
    ]
    calls = []
    dense, sparse, fixed = measure_cell(
        *(session, tokenizer, source, TASKS["needles"], 4096, policies),
        **{"documents": 3, "questions": 8, "seed": 0, "progress": lambda: calls.append(1)},
    )
    assert len(calls) == 9
    assert dense.n == sparse.n == fixed.n == 24
    # 21 right of 24 has a probability under 1% for a model that is right 99% of the time.
    assert dense.accuracy >= 22 / 24
    assert sparse.accuracy >= 22 / 24
    assert fixed.accuracy <= 0.5
    assert sparse.density <= 0.2 and fixed.density <= 0.2
    assert sparse.coverage_error < 0.005


def test_prompts_of_one_document_begin_alike():
    tokenizer = Tokenizer.from_folder(BUNDLED_CHECKPOINT)
    source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False))
    document = TASKS["needles"].make(np.random.default_rng(0), source, 2000, 4)
    prompts = [prompt_tokens(tokenizer, document, i) for i in range(4)]
    common = len(tokenizer.encode(document.text, add_special_tokens=False))
    assert len({tuple(prompt[:common]) for prompt in prompts}) == 1
    assert all(2000 <= len(prompt) <= 2100 for prompt in prompts)


def test_a_question_without_room_is_refused(harness):
    session = Session(harness().decoder, tiny_config(), letters(), tokens=300)
    with pytest.raises(GenerationError, match="behind the document"):
        session.answers([prompt_of(200)], dynamic(), 5000)
