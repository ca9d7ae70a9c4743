"""The evaluation's answers and predictions are the engine's and the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.page import PAGE
from models.loader import load
from models.tokenizer import Tokenizer
from service.config import BUNDLED_CHECKPOINT, SparsityConfig
from service.engine.scheduler import Work
from service.engine.sequence import TAIL, Sequence
from service.errors import ConfigError, GenerationError
from service.eval.measure import SAMPLE, Examiner, Item, Plan, calibration, prompt_tokens
from service.eval.policies import parse_policy
from service.eval.record import record_cell
from service.eval.session import FORCED, Audit, Session, _request
from service.eval.source import Source
from service.eval.tasks import TASKS
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
    exact, estimated = answer.audit.exact, answer.audit.estimated
    assert exact.shape[1] == estimated.shape[1] > 128
    np.testing.assert_allclose(exact.mean((0, 2)), estimated.mean((0, 2)), atol=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", {"policy": "dense"}),
        (" dynamic ", {"policy": "dynamic", "max_keys": 2048, "remainder": True}),
        ("dynamic:k=512", {"min_keys": 512, "max_keys": 512, "coverage": 1.0, "remainder": False}),
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
    "text", ["", "sparse", "dense:1", "dynamic:k=x", "dynamic:keys=3", "dynamic:k=0", "fixed:w:3"]
)
def test_what_is_no_policy_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match="cannot read the policy") as caught:
        parse_policy(text, SparsityConfig())
    assert "\n" not in str(caught.value)


def logits_of(decoder, tokens):
    """[tokens, vocab] of a dense pass over all of them."""
    session = Session(decoder, tiny_config(), letters(), tokens=len(tokens))
    request = _request((*tokens, *[0] * TAIL), DENSE, 1)
    sequence = Sequence(request, 0, list(tokens), pages=list(range(-(-len(tokens) // PAGE))))
    [outcome] = session._runner.run([Work(sequence, 0, len(tokens))])
    return decoder.logits(outcome.hidden)


@pytest.mark.parametrize("targets", [1, 64, 300])
def test_forced_tokens_cost_what_a_dense_pass_says(harness, targets):
    decoder = harness().decoder
    tokens = prompt_of(777)
    session = Session(decoder, tiny_config(), letters(), tokens=800)
    logs = logits_of(decoder, tokens).log_softmax(-1)
    wanted = -logs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[-targets:, 0]
    everything = dynamic(min_keys=800, max_keys=800, coverage=1.0)
    for sparsity in (DENSE, everything):
        forced = session.forced(tokens, targets, sparsity)
        np.testing.assert_allclose(forced.nats, wanted.numpy(), rtol=1e-9)
        assert forced.report.density == 1.0
    assert forced.audit.exact.shape == (3, min(targets, FORCED), 4)
    sparse = session.forced(tokens, targets, dynamic())
    assert sparse.report.density < 0.5
    assert not np.allclose(sparse.nats, wanted.numpy(), rtol=1e-3)


def test_what_a_document_costs_does_not_depend_on_what_ran_before(harness):
    decoder = harness().decoder
    tokens, other = prompt_of(700), prompt_of(650, 3)

    def session():
        return Session(decoder, tiny_config(), letters(), tokens=800)

    fresh, used = session(), session()
    for _ in range(2):
        used.forced(other, 100, dynamic())
        used.answers([other], dynamic(), 3)
    a, b = (one.forced(tokens, 100, dynamic()) for one in (fresh, used))
    assert (a.nats == b.nats).all() and (a.audit.exact == b.audit.exact).all()
    [c], [d] = (one.answers([tokens], dynamic(), 9) for one in (fresh, used))
    assert c.text == d.text and (c.audit.exact == d.audit.exact).all()


def test_errors_are_taken_layer_by_layer_and_head_by_head():
    exact = np.array([0.2, 0.8, 0.5, 0.5]).reshape(2, 1, 2)
    estimated = np.array([0.4, 0.6, 0.54, 0.5]).reshape(2, 1, 2)  # their means agree to 0.01
    found = calibration([Audit(exact, estimated), Audit(exact[:, :0], estimated[:, :0])])
    assert found.count == 4 and found.over == 1
    assert found.error == pytest.approx(0.44) and found.total == pytest.approx(2.0)
    assert found.exact.tolist() == exact.ravel().tolist()
    many = np.random.default_rng(0).random((2, 5000, 2))
    sample = calibration([Audit(many, many)]).exact
    assert len(sample) == SAMPLE and np.isin(sample, many).all()
    assert (sample == calibration([Audit(many, many)]).exact).all()


def test_the_bundled_checkpoint_keeps_its_answers_under_the_default_policy():
    tokenizer = Tokenizer.from_folder(BUNDLED_CHECKPOINT)
    decoder, config = load(BUNDLED_CHECKPOINT, "auto", "cpu")
    session = Session(decoder, config, tokenizer, tokens=4096)
    source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False))
    policies = tuple(
        parse_policy(text, SparsityConfig())
        for text in ("dense", "dynamic", "fixed:sinks:16+window:512")
    )
    examiner = Examiner(session, tokenizer, source, Plan(policies, questions=8, seed=0))
    scores = [examiner.measure(Item("needles", 4096, number)) for number in range(3)]
    dense, sparse, fixed = record_cell("needles", 4096, scores, passages=False)
    assert dense.n == sparse.n == fixed.n == 24
    # 21 right of 24 has a probability under 1% for a model that is right 99% of the time.
    assert dense.accuracy >= 22 / 24
    assert sparse.accuracy >= 22 / 24
    assert fixed.accuracy <= 0.5
    assert sparse.density <= 0.2 and fixed.density <= 0.2
    assert sparse.coverage_error < 0.005
    assert sparse.constant_error > 0.05
    assert sparse.loss == pytest.approx(dense.accuracy - sparse.accuracy)
    assert fixed.loss_low >= 0.5
    [text] = record_cell("text", 4096, [examiner.measure(Item("text", 4096, 0))[:1]], passages=True)
    assert text.accuracy is None and text.n == 512
    assert 0.5 < text.bits_per_byte < 2.0  # English, which the model was trained on


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
