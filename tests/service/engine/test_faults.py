"""Faults are injected into the GPU's kernels: what fails is told, counted, and no wrong token."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels.attention import Impl
from kernels.policy import Dynamic
from service.engine.build import build_engine
from service.engine.device import check_alive
from service.errors import EngineDeadError
from tests.service.conftest import ROOT
from tests.service.engine.tiny import dynamic, greedy, prompt_of, tiny_config, tokens_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = tiny_config(layers=1, heads=2, kv_heads=1, windows=(None,), dtype="float32")
TAIL, HOLD = 2, 3
DYNAMIC, DENSE, FIXED = dynamic(), dynamic(policy="dense"), dynamic(policy="fixed")
WHOLE = dynamic(coverage=1.0, min_keys=4000, max_keys=4000)
"""Selects every key: what is answered does not hang on how the company rounds a number."""
LOST = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(autouse=True)
def little_work(few_programs, monkeypatch):
    monkeypatch.setattr("kernels.gpu.decode.SAMPLE", 8)
    monkeypatch.setattr("service.engine.sequence.TAIL", TAIL)
    monkeypatch.setattr("service.engine.holds.HOLD", HOLD)


@pytest.fixture
def triton(harness):
    """Factory of engines over Triton's kernels."""
    fields = {"config": CONFIG, "impl": Impl.TRITON, "device": DEVICE, "pages": 40}
    return lambda **changes: harness(**{"dtype": torch.float32} | fields | changes)


@pytest.fixture(scope="module")
def once():
    """Makes what several cases of a test compare with, the first time that it is asked for."""
    made = {}

    def known(name, make):
        if name not in made:
            made[name] = make()
        return made[name]

    return known


def counted(one):
    """Tokens that fell back, by reason, as `/metrics` has them."""
    found = {}
    for family in one.engine.metrics.registry.collect():
        for sample in family.samples:
            if sample.name == "saccade_attention_fallback_total" and sample.value:
                reason = sample.labels["reason"]
                found[reason] = found.get(reason, 0) + sample.value
    return found


def told(*answers):
    """The same, as the answers have them."""
    found = {}
    for deltas in answers:
        for reason, tokens in deltas[-1].sparsity.fallbacks.items():
            found[reason] = found.get(reason, 0) + tokens
    return found


def failing(monkeypatch, name, error, times=10**6):
    """Have a launch raise, the first `times` times."""
    module, _, function = name.rpartition(".")
    launch, calls = getattr(import_module(module), function), []

    def launched(*args, **kwargs):
        calls.append(name)
        if len(calls) <= times:
            raise error
        return launch(*args, **kwargs)

    monkeypatch.setattr(name, launched)
    return calls


ERRORS = {
    "launch": RuntimeError("CUDA error: invalid configuration argument"),
    "resources": OutOfResources(300_000, 232_448, "shared memory"),
}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("kernels.gpu.decode.prepare", "launch"),
        ("kernels.gpu.decode.probe", "resources"),
        ("kernels.gpu.decode.scan", "launch"),
    ],
)
def test_a_selection_that_is_never_launched_takes_the_fixed_pattern(
    triton, monkeypatch, once, name, error
):
    one, prompt = triton(), prompt_of(200)
    expected = once("fixed", lambda: triton().tokens(prompt, greedy(5), FIXED))
    neighbour = once("dense", lambda: triton().tokens(prompt_of(90, 1), greedy(5), DENSE))
    one.tokens(prompt_of(9), greedy(2), FIXED)  # an engine's first step is audited
    before = counted(one)
    calls = failing(monkeypatch, name, ERRORS[error])
    answers = one.run(
        one.generate(prompt, greedy(5)), one.generate(prompt_of(90, 1), greedy(5), DENSE)
    )
    assert calls
    assert [tokens_of(deltas) for deltas in answers] == [expected, neighbour]
    assert told(answers[0]) == {"kernel_error": TAIL + 4}
    assert told(answers[1]) == {"requested": TAIL + 4}
    after = counted(one)
    assert {r: after[r] - before.get(r, 0) for r in after} == told(*answers)
    assert answers[0][-1].sparsity.coverage == 0.0  # unknown: what would judge it has failed
    health = one.engine.health()
    assert health.alive and health.degraded and type(ERRORS[error]).__name__ in health.reason


def test_a_launch_that_fails_once_is_tried_again_after_a_while(triton, monkeypatch):
    one, prompt = triton(), prompt_of(150)
    expected = one.tokens(prompt, greedy(HOLD + 4), FIXED)
    failing(monkeypatch, "kernels.gpu.decode.scan", ERRORS["launch"], times=1)
    before = counted(one)
    [deltas] = one.run(one.generate(prompt, greedy(HOLD + 4)))
    assert tokens_of(deltas)[: HOLD + 1] == expected[: HOLD + 1]
    assert told(deltas) == {"kernel_error": TAIL + HOLD}
    assert counted(one)["kernel_error"] == TAIL + HOLD and "kernel_error" not in before
    assert not one.engine.health().degraded


def test_a_launch_that_fails_once_for_several_costs_none_of_them_anything(triton, monkeypatch):
    one, prompts = triton(), [prompt_of(n, n) for n in (150, 200)]
    expected = [one.tokens(prompt, greedy(3), WHOLE) for prompt in prompts]
    calls = failing(monkeypatch, "kernels.gpu.decode.scan", ERRORS["launch"], times=1)
    answers = one.run(*(one.generate(prompt, greedy(3), WHOLE) for prompt in prompts))
    assert len(calls) > 1
    assert [tokens_of(deltas) for deltas in answers] == expected
    assert told(*answers) == counted(one) == {}
    assert not one.engine.health().degraded


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("kernels.gpu.attend.dense_decode", DENSE),
        ("kernels.gpu.attend.selected_attention", FIXED),
    ],
)
def test_attention_that_nothing_can_take_the_place_of_fails_its_own_requests(
    triton, monkeypatch, name, policy
):
    one, prompt = triton(), prompt_of(200)
    expected = one.tokens(prompt, greedy(4), WHOLE)  # an engine's first step is audited, densely
    calls = failing(monkeypatch, name, ERRORS["launch"])
    broken, fine = one.run(
        one.generate(prompt_of(70, 1), greedy(4), policy), one.generate(prompt, greedy(4), WHOLE)
    )
    assert calls
    assert broken[-1].finish_reason == "error"
    assert broken[-1].error == "the model failed on this request: RuntimeError"
    assert tokens_of(fine) == expected and told(fine) == {}
    assert told(broken) == counted(one)
    assert one.engine.health().alive and one.engine._scheduler.pool.usage == 0


def test_a_request_whose_fallback_fails_too_ends_with_an_error(triton, monkeypatch):
    one = triton()
    expected = one.tokens(prompt_of(70, 1), greedy(4), DENSE)
    before = counted(one)
    failing(monkeypatch, "kernels.gpu.decode.scan", ERRORS["launch"])
    failing(monkeypatch, "kernels.gpu.attend.selected_attention", ERRORS["resources"])
    monkeypatch.setattr("service.engine.trouble.LASTS", 3600.0)  # kernels may compile meanwhile
    broken, fine = one.run(
        one.generate(prompt_of(200), greedy(4)),
        one.generate(prompt_of(70, 1), greedy(4), DENSE),
    )
    assert broken[-1].error == "the model failed on this request: OutOfResources"
    assert tokens_of(broken) == [] and told(broken) == {}
    assert tokens_of(fine) == expected
    assert counted(one) == {"requested": before["requested"] + told(fine)["requested"]}
    assert one.engine.health().degraded


class Spoilt:
    """A model in whose cache something of one sequence turns bad once its prompt is in.

    Args:
        model: the model.
        length: tokens of the sequence's prompt.
        spoil: does it, given a layer's cache and the sequence's physical pages.
    """

    def __init__(self, model, length, spoil):
        self._model, self._length, self._spoil = model, length, spoil
        self.logits = model.logits

    def __call__(self, step, caches, recorder):
        for group in step.sparse:
            ends = group.rows.lengths.view(group.rows.sequences, -1)[:, -1]
            for sequence in (ends == self._length + 1).nonzero().flatten().tolist():
                for cache in caches if isinstance(group.policy, Dynamic) else ():
                    self._spoil(cache, group.rows.block_tables[sequence])
        return self._model(step, caches, recorder)


# Behind the sinks and in front of the windows: in the second page.


def spoil_key(value):
    def spoil(cache, pages):
        cache.kv[0, pages[1], 5, 0, 3] = value
        cache.code(pages[1:2])

    return spoil


def spoil_code(cache, pages):
    cache.scale[0, pages[1], :, 0] = torch.nan  # wherever it is probed


def spoil_centre(cache, pages):
    cache.centre[0, pages[1]] = torch.nan


def spoil_recent_key(cache, pages):
    cache.kv[0, pages[-1], 2, 0, 3] = torch.nan


def raise_instead(cache, pages):
    raise RuntimeError("no selection from here on")


def leave_whole(cache, pages):
    pass


SPOILT = {
    "a key": spoil_key(torch.nan),
    "an infinite key": spoil_key(torch.inf),
    "a code": spoil_code,
    "a page's centre": spoil_centre,
}
PAIR = prompt_of(200), prompt_of(195, 1)
"""Tables of the same width: what a row rounds depends on it."""


def answers_of(triton, spoil, *tokens):
    """An engine whose first sequence is spoilt, and the answers to `PAIR` of so many tokens."""
    one = triton(wrap=lambda model: Spoilt(model, len(PAIR[0]), spoil))
    calls = (one.generate(p, greedy(n)) for p, n in zip(PAIR, tokens, strict=True))
    return one, *one.run(*calls)


@pytest.mark.parametrize("what", ["a key", "a code"])
def test_scores_that_are_not_finite_take_the_fixed_pattern_in_their_sequence_alone(
    triton, once, what
):
    one, broken, fine = answers_of(triton, SPOILT[what], 3, 3)
    _, fallen, _ = once("fallen", lambda: answers_of(triton, raise_instead, 3, 3))
    _, _, company = once("whole", lambda: answers_of(triton, leave_whole, 3, 3))
    assert tokens_of(broken) == tokens_of(fallen)
    assert tokens_of(fine) == tokens_of(company)
    assert told(broken) == told(fallen) == counted(one) == {"kernel_error": 2}
    assert told(fine) == {}
    health = one.engine.health()
    assert health.alive and health.degraded and "not finite" in health.reason


@pytest.mark.parametrize("what", SPOILT)
def test_the_company_of_scores_that_are_not_finite_has_the_tokens_that_it_has_alone(harness, what):
    """In float64, where rounding decides nothing."""
    sick, well = prompt_of(1000), prompt_of(900, 1)
    alone = harness().tokens(well, greedy(8))
    one = harness(wrap=lambda model: Spoilt(model, len(sick), SPOILT[what]))
    one.runner._audit_every = 1
    broken, fine = one.run(one.generate(sick, greedy(8)), one.generate(well, greedy(8)))
    assert tokens_of(fine) == alone and told(fine) == {}
    assert len(tokens_of(broken)) == 8
    # On the pattern, after a while tried again, and as bad as before.
    assert told(broken) == counted(one) == {"kernel_error": 7}
    for family in one.engine.metrics.registry.collect():
        assert not any(math.isnan(sample.value) for sample in family.samples)


def test_a_key_that_the_fixed_pattern_reads_too_ends_its_request(triton):
    one, broken, fine = answers_of(triton, spoil_recent_key, 4, 4)
    _, whole, company = answers_of(triton, leave_whole, 2, 4)
    assert tokens_of(broken) == tokens_of(whole)[:1]  # of before
    assert broken[-1].error == "the model's output for this is not finite"
    assert tokens_of(fine) == tokens_of(company)
    assert told(broken, fine) == counted(one) == {}
    assert one.engine.health().alive


SHAPES = {
    "too small": (8, 2),
    "of three words": (160, 2),
    "too large": (264, 2),
    "too many": (16, 48),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_shape_that_tritons_kernels_do_not_take_attends_dynamically_all_the_same(harness, what):
    head_dim, group = SHAPES[what]
    impl = Impl.of(torch.device("cuda"), torch.float32, head_dim, group)
    assert impl is Impl.TORCH
    config = tiny_config(
        layers=1, heads=group, kv_heads=1, windows=(None,), head_dim=head_dim, dtype="float32"
    )
    one = harness(dtype=torch.float32, config=config, impl=impl)
    [sparse] = one.run(one.generate(prompt_of(900), greedy(4)))
    report = sparse[-1].sparsity
    assert report.policy == "dynamic" and report.density < 1
    assert told(sparse) == counted(one) == {}
    [whole] = one.run(one.generate(prompt_of(900), greedy(4), WHOLE))
    assert tokens_of(whole) == one.tokens(prompt_of(900), greedy(4), DENSE)
    assert whole[-1].sparsity.density == 1 and told(whole) == {}


@pytest.mark.parametrize(("dtype", "backend"), [("float32", "numba"), ("float64", "torch")])
def test_slow_attention_is_said_at_the_start(service_config, caplog, dtype, backend):
    engine = build_engine(service_config.model_copy(update={"dtype": dtype, "device": "cpu"}))
    assert ("in torch's operations" in caplog.text) == (backend == "torch")
    info = engine.metrics.registry.get_sample_value(
        "saccade_attention_backend_info", {"model_name": engine.model_name, "backend": backend}
    )
    assert info == 1
    assert not engine.health().degraded


def lose_device(monkeypatch):
    """Whatever fails finds a GPU that no longer answers."""

    def synchronize(_):
        raise torch.AcceleratorError(f"{LOST}\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(
        "service.engine.runner.check_alive",
        lambda _, error: check_alive(torch.device("cuda"), error),
    )


@pytest.mark.parametrize("where", ["kernels.gpu.decode.scan", "service.engine.sampler._nucleus"])
def test_a_device_that_no_longer_answers_stops_the_engine(triton, monkeypatch, where):
    one = triton()
    lose_device(monkeypatch)
    failing(monkeypatch, where, torch.AcceleratorError(LOST))
    sampling = greedy(4, temperature=1.0)
    answers = one.run(
        *(one.generate(prompt_of(n, n), sampling, p) for n, p in ((90, DYNAMIC), (80, DENSE)))
    )
    for deltas in answers:
        assert deltas[-1].finish_reason == "error" and LOST in deltas[-1].error
    assert sum(len(tokens_of(deltas)) for deltas in answers) == 0
    one.engine._thread.join(10)
    health = one.engine.health()
    assert not health.alive and LOST in health.reason and "\n" not in health.reason
    with pytest.raises(EngineDeadError, match="no longer answers"):
        one.run(one.generate(prompt_of(9)))
    assert counted(one) == {}


def test_a_fallback_that_finds_the_device_lost_stops_the_engine(triton, monkeypatch):
    one = triton()
    lost = torch.AcceleratorError(LOST)
    failing(monkeypatch, "kernels.gpu.decode.scan", ERRORS["launch"])
    failing(monkeypatch, "kernels.gpu.attend.selected_attention", lost)

    def check(_, error):
        if error is lost:
            raise EngineDeadError(LOST)

    monkeypatch.setattr("service.engine.runner.check_alive", check)
    [deltas] = one.run(one.generate(prompt_of(90), greedy(4)))
    assert LOST in deltas[-1].error
    one.engine._thread.join(10)
    assert not one.engine.health().alive


def test_a_failure_on_a_device_that_answers_is_a_requests_own(monkeypatch):
    error = RuntimeError("CUDA error: invalid configuration argument")
    check_alive(torch.device("cpu"), error)
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    check_alive(torch.device("cuda:1"), error)
    assert asked == [torch.device("cuda:1")]


POISON = """
import torch, triton, triton.language as tl
from service.engine.device import check_alive
from service.errors import EngineDeadError

@triton.jit
def stray(memory):
    tl.store(memory + (1 << 40), 1.0)

stray[1,](torch.zeros(1, device="cuda"))
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    try:
        check_alive(torch.device("cuda"), error)
    except EngineDeadError as dead:
        print(dead)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to lose")
def test_a_real_gpu_is_lost_by_an_illegal_access(tmp_path):
    script = tmp_path / "poison.py"  # Triton reads a kernel's source from its file
    script.write_text(POISON)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert "no longer answers (CUDA error: an illegal memory access" in done.stdout, done.stderr
