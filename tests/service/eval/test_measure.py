"""The evaluation's answers and predictions are the engine's and the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cache import LayerCache
from kernels.page import PAGE
from service.config import BUNDLED_CHECKPOINT
from service.engine import holds
from service.engine.scheduler import Work
from service.engine.sequence import TAIL, Sequence
from service.errors import ConfigError, GenerationError
from service.eval.cell import Cell, Item
from service.eval.drawer import Drawing
from service.eval.measure import SAMPLE, calibration
from service.eval.paper import Dictation, Exam
from service.eval.policies import parse_policy
from service.eval.prompts import split
from service.eval.record import record_cell
from service.eval.room import TOGETHER, Room
from service.eval.script import Audit
from service.eval.session import FORCED, Session, _request, chosen, steps
from service.eval.workers import Setup
from service.sparsity import SparsityConfig
from tests.service.engine.tiny import (
    dynamic,
    greedy,
    letters,
    level,
    make_decoder,
    prompt_of,
    text_of,
    tiny_config,
)

CPU = torch.device("cpu")
DENSE = dynamic(policy="dense")
FIXED = dynamic(policy="fixed")


ROOM = Room(pages=200, together=8, step=512)


def session_of(decoder, room=ROOM):
    return Session(decoder, tiny_config(), letters(), room)


def exam(prompts, answer_tokens=9, seeds=()):
    """As a drawer would write it."""
    shared, tails = split([np.array(prompt, dtype=np.int32) for prompt in prompts])
    return Exam(shared, tails, (), answer_tokens, seeds)


def dictation(tokens, targets):
    return Dictation(np.array(tokens, dtype=np.int32), targets)


@pytest.mark.parametrize("sparsity", [dynamic(), dynamic(min_coverage=0.9), DENSE, FIXED])
def test_answers_and_reports_are_those_of_the_engine(harness, sparsity):
    one = harness()
    document = prompt_of(700, 1)
    prompts = [document + prompt_of(n, n) for n in (30, 150, 31)]
    session = session_of(one.decoder, Room(pages=200, together=2, step=512))
    [[answers]] = session.answers([exam(prompts)], [sparsity])
    ends = tiny_config().eos_ids
    for prompt, answer in zip(prompts, answers, strict=True):
        [deltas] = one.run(one.generate(prompt, greedy(9, ignore_eos=not ends), sparsity))
        report = deltas[-1].sparsity
        assert answer.text.startswith(text_of(deltas))
        assert answer.report.density == pytest.approx(report.density)
        assert answer.report.coverage == pytest.approx(report.coverage)
        assert answer.report.fallbacks == report.fallbacks


@pytest.mark.parametrize("step", [512, TAIL])
def test_sparse_prompts_read_and_fall_back_as_in_the_engine(harness, monkeypatch, step):
    monkeypatch.setattr(holds, "PROMPT_HOLD", 256)
    one = harness(wrap=level)
    document = prompt_of(1200, 1)
    prompts = [document + prompt_of(n, n) for n in (30, 150)]
    floors = (0.0, 0.35, 1.0)
    policies = [
        dynamic(prefill="dynamic", prefill_coverage=0.7, min_coverage=floor) for floor in floors
    ]
    session = session_of(one.decoder, Room(pages=200, together=2, step=step))
    answers = session.answers([exam(prompts)], policies)
    found = []
    for number, sparsity in enumerate(policies):
        for prompt, answer in zip(prompts, answers[number][0], strict=True):
            [deltas] = one.run(one.generate(prompt, greedy(9, ignore_eos=False), sparsity))
            report = deltas[-1].sparsity
            assert answer.text.startswith(text_of(deltas))
            assert answer.report.fallbacks == report.fallbacks
            assert answer.report.prefill.density == pytest.approx(report.prefill.density)
            assert answer.report.prefill.coverage == pytest.approx(report.prefill.coverage)
            found.append(report.prefill.density)
    assert found[0] < found[2] < found[4] == 1.0


@pytest.mark.parametrize(("room", "step"), [(200, 512), (20, TAIL)])
def test_sampled_answers_depend_on_their_seeds_alone(harness, room, step):
    decoder = harness().decoder
    prompts = [prompt_of(length, length) for length in (600, 300)]
    sampled = [exam([one] * 3, 20, (5, 6, 7)) for one in prompts]
    exams = [sampled[0], exam([prompts[0]], 20), sampled[1]]
    policies = [DENSE, dynamic(), DENSE]
    found = session_of(decoder, Room(room, 7, step)).answers(exams, policies)
    texts = [[[one.text for one in answers] for answers in some] for some in found]
    assert texts[0] == texts[2]  # every policy draws the same numbers
    assert len(set(texts[0][0])) == 3
    assert len(texts[0][0][0]) > 1
    for number, one in enumerate(exams):
        alone = session_of(decoder).answers([one], policies[:2])
        for policy in range(2):
            assert [a.text for a in alone[policy][0]] == texts[policy][number]
    # A seed's answer does not depend on how many are asked for.
    fewer = exam([prompts[0]], 20, (6,))
    [[[answer]]] = session_of(decoder).answers([fewer], [DENSE])
    assert answer.text == texts[0][0][1]


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([0.5, -torch.inf, 2.0, 1.0])
    rngs = [np.random.default_rng(seed) for seed in range(4000)]
    drawn = chosen(logits.expand(4001, 4), [*rngs, None])
    assert drawn.pop() == 2
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, logits.double().softmax(-1).numpy(), atol=0.025)
    assert shares[1] == 0
    assert drawn == chosen(
        logits.expand(4000, 4), [np.random.default_rng(seed) for seed in range(4000)]
    )


class Extreme:
    """A generator that draws the greatest number below one, or zero."""

    def __init__(self, number):
        self.random = lambda: number


@pytest.mark.parametrize("number", [0.0, float(np.nextafter(1.0, 0.0))])
def test_no_number_draws_what_the_model_excludes(number):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    logits[:, :40] = logits[:, -40:] = -torch.inf
    drawn = chosen(logits, [Extreme(number)] * 50)
    assert all(40 <= token < 260 for token in drawn)


@pytest.fixture(scope="module")
def alone():
    """Exams, policies, and the answers to each exam on its own."""
    exams = [
        exam([prompt_of(length, length) + prompt_of(n, n) for n in (130, 40, 170)])
        for length in (700, 300, 90, 600)
    ]
    # Some fall back here and there, and so do not look sparsely in every step.
    policies = [dynamic(), dynamic(min_coverage=0.93), DENSE, FIXED]
    room, decoder = Room(200, 16, 2048), make_decoder()
    return exams, policies, [session_of(decoder, room).answers([one], policies) for one in exams]


@pytest.mark.parametrize(("room", "step"), [(200, 512), (47, 200), (20, TAIL)])
def test_documents_together_get_the_answers_that_they_get_alone(alone, room, step):
    exams, policies, expected = alone
    together = session_of(make_decoder(), Room(room, 7, step)).answers(exams, policies)
    fallbacks = 0
    for number in range(len(exams)):
        for policy in range(len(policies)):
            for a, b in zip(together[policy][number], expected[number][policy][0], strict=True):
                assert a.text == b.text
                assert a.report.density == pytest.approx(b.report.density)
                assert a.report.fallbacks == b.report.fallbacks
                assert a.audit.exact.shape == b.audit.exact.shape
                np.testing.assert_allclose(a.audit.exact, b.audit.exact, atol=1e-9)
                np.testing.assert_allclose(a.audit.estimated, b.audit.estimated, atol=1e-9)
                fallbacks += a.report.fallbacks.get("low_coverage", 0)
    assert fallbacks


def test_passages_together_cost_what_they_cost_alone(harness):
    decoder = harness().decoder
    texts = [dictation(prompt_of(n, n), 300) for n in (500, 777, 900)]
    together = session_of(decoder).forced(texts, [dynamic(), DENSE])
    for number, one in enumerate(texts):
        alone = session_of(decoder).forced([one], [dynamic(), DENSE])
        for policy in range(2):
            a, [b] = together[policy][number], alone[policy]
            np.testing.assert_allclose(a.nats, b.nats, rtol=1e-9)
            np.testing.assert_allclose(a.audit.exact, b.audit.exact, atol=1e-9)


def test_every_fourth_step_is_audited_from_the_tail_on(harness):
    session = session_of(harness().decoder)
    [[[answer]]] = session.answers([exam([prompt_of(700)])], [dynamic()])
    exact, estimated = answer.audit.exact, answer.audit.estimated
    assert exact.shape[1] == estimated.shape[1] == TAIL + 2  # the fourth and the eighth token
    assert 0 < np.abs(exact - estimated).mean() < 0.15  # codes of 16 channels are coarse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", {"policy": "dense"}),
        (" dynamic ", {"policy": "dynamic", "max_keys": 1024, "sampled": True}),
        ("dynamic:k=512", {"min_keys": 512, "max_keys": 512, "coverage": 1.0, "sampled": True}),
        ("dynamic:coverage=0.9,max_keys=700", {"coverage": 0.9, "max_keys": 700, "min_keys": 384}),
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
    session = session_of(decoder)
    request = _request((*tokens, *[0] * TAIL), DENSE, 1)
    sequence = Sequence(request, 0, list(tokens), pages=list(range(-(-len(tokens) // PAGE))))
    [outcome] = session._runner.run([Work(sequence, 0, len(tokens))])
    return decoder.logits(outcome.hidden)


@pytest.mark.parametrize("targets", [1, 64, 300])
def test_forced_tokens_cost_what_a_dense_pass_says(harness, targets):
    decoder = harness().decoder
    tokens = prompt_of(777)
    logs = logits_of(decoder, tokens).log_softmax(-1)
    wanted = -logs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[-targets:, 0]
    everything = dynamic(min_keys=800, max_keys=800, coverage=1.0)
    policies = [DENSE, everything, dynamic()]
    found = session_of(decoder).forced([dictation(tokens, targets)], policies)
    for [forced] in found[:2]:
        np.testing.assert_allclose(forced.nats, wanted.numpy(), rtol=1e-9)
        assert forced.report.density == 1.0
    assert found[1][0].audit.exact.shape == (3, min(targets, FORCED), 4)
    [sparse] = found[2]
    assert sparse.report.density < 0.7
    assert not np.allclose(sparse.nats, wanted.numpy(), rtol=1e-3)


def test_what_a_document_costs_does_not_depend_on_what_ran_before(harness):
    decoder = harness().decoder
    tokens, other = prompt_of(700), prompt_of(650, 3)
    fresh, used = session_of(decoder), session_of(decoder)
    for _ in range(2):
        used.forced([dictation(other, 100)], [dynamic()])
        used.answers([exam([other], 3)], [dynamic()])
    a, b = (one.forced([dictation(tokens, 100)], [dynamic()])[0][0] for one in (fresh, used))
    assert (a.nats == b.nats).all() and (a.audit.exact == b.audit.exact).all()
    c, d = (one.answers([exam([tokens])], [dynamic()])[0][0][0] for one in (fresh, used))
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
    policies = tuple(
        parse_policy(text, SparsityConfig())
        for text in ("dense", "dynamic", "fixed:sinks:16+window:512")
    )
    cell = Cell("needles", 4096, 3, policies)
    drawer = Drawing(BUNDLED_CHECKPOINT, questions=8, seed=0).drawer()
    examiner = Setup(BUNDLED_CHECKPOINT, "auto", "safetensors", 4096).examiner(CPU)
    scores = [examiner.measure([drawer(Item(cell, i))], policies)[0] for i in range(3)]
    dense, sparse, fixed = record_cell("needles", 4096, scores, passages=False)
    assert dense.n == sparse.n == fixed.n == 24
    # 21 right of 24 has a probability under 1% for a model that is right 99% of the time.
    assert dense.accuracy >= 22 / 24
    assert sparse.accuracy >= 22 / 24
    assert fixed.accuracy <= 0.5
    assert sparse.density <= 0.2 and fixed.density <= 0.2
    assert sparse.coverage_error < 0.012
    assert sparse.constant_error > 0.05
    assert sparse.loss == pytest.approx(dense.accuracy - sparse.accuracy)
    assert fixed.loss_low >= 0.5
    passage = drawer(Item(Cell("text", 4096, 1, policies[:1]), 0))
    [text] = record_cell("text", 4096, examiner.measure([passage], policies[:1]), passages=True)
    assert text.accuracy is None and text.n == 512
    assert 0.5 < text.bits_per_byte < 2.0  # English, which the model was trained on


def test_what_has_no_room_is_refused(harness):
    session = session_of(harness().decoder)
    with pytest.raises(GenerationError, match="there is memory for 200"):
        session.answers([exam([prompt_of(200)], 20_000)], [dynamic()])
    with pytest.raises(GenerationError, match="pages of 64 tokens"):
        session.forced([dictation(prompt_of(13_000), 10)], [dynamic()])


def test_steps_hold_at_most_so_many_tokens_in_order():
    work = [Work(None, 10, 5), Work(None, 0, 3), Work(None, 0, 0), Work(None, 7, 20)]
    cut = [[(one.start, one.count) for one in step] for step in steps(work, 8)]
    assert cut == [[(10, 5), (0, 3)], [(7, 8)], [(15, 8)], [(23, 4)]]


def test_a_gpu_holds_what_its_memory_and_the_model_allow(monkeypatch):
    cuda, config = torch.device("cuda"), tiny_config()
    each = config.layers * LayerCache.bytes_per_page(2, 16, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    room = Room.on(cuda, config, torch.bfloat16, 65_536)
    assert room.step == 65_536 and room.together == TOGETHER["cuda"]
    assert room.pages == 160 * (1024 + 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8000 * each, 10_000 * each))
    assert Room.on(cuda, config, torch.bfloat16, 65_536).pages == 4000
    assert Room.on(cuda, config, torch.bfloat16, 65_536, sharing=4).pages == 1250
    with pytest.raises(GenerationError, match="fewer --workers"):
        Room.on(cuda, config, torch.bfloat16, 65_536, sharing=8)
    wide = tiny_config(intermediate_size=14_336, hidden_size=4096, heads=32, head_dim=128)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    assert 8192 <= Room.on(cuda, wide, torch.bfloat16, 65_536).step <= 32_768
