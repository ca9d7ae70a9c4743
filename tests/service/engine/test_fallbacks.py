"""What happens when dynamic selection cannot or should not run, and how it is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from kernels import dynamic as dynamic_kernel
from kernels.budget import SAMPLE
from kernels.errors import KernelError
from kernels.patterns import lists
from tests.service.engine.tiny import dynamic, greedy, prompt_of, text_of, tokens_of

DENSE, FIXED = dynamic(policy="dense"), dynamic(policy="fixed")


def last(deltas):
    return deltas[-1].sparsity


def counter(harness, name, **labels):
    return (
        harness.engine.metrics.registry.get_sample_value(
            f"saccade_{name}", {"model_name": "tiny", **labels}
        )
        or 0.0
    )


def test_a_dynamic_answer_reports_what_it_looked_at(harness):
    one = harness()
    [deltas] = one.run(one.generate(prompt_of(2000), greedy(10)))
    report = last(deltas)
    assert report.policy == "dynamic" and report.fallbacks == {}
    # The recent window, the sinks, and a sample: less than its marks, as few keys carry much.
    assert 80 < report.keys_attended < SAMPLE + 143
    assert report.keys_attended / 2010 <= report.density <= report.keys_attended / 1872
    assert 0 < report.coverage_p5 <= report.coverage <= 1
    assert [d.sparsity for d in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_a_dense_answer_says_so(harness):
    one = harness()
    [deltas] = one.run(one.generate(prompt_of(500), greedy(10), DENSE))
    report = last(deltas)
    assert (report.policy, report.density, report.coverage) == ("dense", 1.0, 1.0)
    assert report.fallbacks == {"requested": 128 + 9}
    assert report.keys_attended == pytest.approx((373 + 509) / 2)


def test_a_fixed_answer_reports_an_estimated_coverage(harness):
    one = harness()
    [deltas] = one.run(one.generate(prompt_of(1500), greedy(10), FIXED))
    report = last(deltas)
    assert report.policy == "fixed" and report.keys_attended == 68
    assert 0 < report.coverage < 0.9
    assert report.fallbacks == {"requested": 128 + 9}
    assert counter(one, "attention_fallback_total", reason="requested", to="fixed") == 137


def test_a_short_context_is_dense_until_it_is_long(harness):
    one = harness(dense_below=800)
    [deltas] = one.run(one.generate(prompt_of(780), greedy(60)))
    report = last(deltas)
    # Positions 652 to 799 are short; 800 to 838 are selected (the last token is never computed).
    assert report.fallbacks == {"short_context": 148}
    assert counter(one, "attention_fallback_total", reason="short_context", to="dense") == 148
    expected = (148 * 1.0 + 39 * report.keys_attended / 820) / 187
    assert report.density < 1 and report.density == pytest.approx(expected, abs=0.2)


def test_low_coverage_goes_dense_before_anything_is_emitted(harness):
    one = harness()
    prompt = prompt_of(1200)
    demanding = dynamic(min_coverage=1.0, coverage=0.5)
    [deltas] = one.run(one.generate(prompt, greedy(50), demanding))
    report = last(deltas)
    assert report.density == 1.0
    assert report.fallbacks == {"low_coverage": 128 + 49}
    assert tokens_of(deltas) == one.tokens(prompt, greedy(50), DENSE)
    assert counter(one, "attention_fallback_total", reason="low_coverage", to="dense") == 177


def test_low_coverage_is_tried_again_after_a_while(harness, monkeypatch):
    one = harness()
    calls = []
    attend = dynamic_kernel.attend

    def low_at_first(*args):
        calls.append(1)
        found = attend(*args)
        # The tail's pass, three layers, is judged low; everything later is fine.
        return replace(found, coverage=found.coverage * (0.0 if len(calls) <= 3 else 1.0))

    monkeypatch.setattr(dynamic_kernel, "attend", low_at_first)
    [deltas] = one.run(one.generate(prompt_of(1000), greedy(60), dynamic(min_coverage=0.2)))
    assert last(deltas).fallbacks == {"low_coverage": 128 + 32}
    assert last(deltas).density < 1


def fail(*args, **kwargs):
    raise KernelError("launch failed")


def test_a_kernel_error_takes_the_fixed_pattern_and_degrades_the_replica(harness, monkeypatch):
    one = harness()
    prompt = prompt_of(1000)
    expected = one.tokens(prompt, greedy(40), FIXED)
    assert not one.engine.health().degraded
    with monkeypatch.context() as patch:
        patch.setattr(dynamic_kernel, "select", fail)
        [deltas] = one.run(one.generate(prompt, greedy(40)))
        assert one.engine.health().degraded and one.engine.health().alive
        assert "KernelError" in one.engine.health().reason
    assert tokens_of(deltas) == expected
    assert last(deltas).fallbacks == {"kernel_error": 128 + 39}
    assert counter(one, "attention_fallback_total", reason="kernel_error", to="fixed") == 167
    one.tokens(prompt, greedy(2))
    assert not one.engine.health().degraded


def test_scores_that_are_not_finite_take_the_fixed_pattern(harness, monkeypatch):
    one = harness()
    prompt = prompt_of(900)
    expected = one.tokens(prompt, greedy(8), FIXED)
    attend = dynamic_kernel.attend
    broken = []

    def broken_attend(*args):
        found = attend(*args)
        broken.append(found.coverage.fill_(torch.nan))
        return found

    monkeypatch.setattr(dynamic_kernel, "attend", broken_attend)
    [deltas] = one.run(one.generate(prompt, greedy(8)))
    assert broken
    assert tokens_of(deltas) == expected
    assert last(deltas).fallbacks == {"kernel_error": 128 + 7}
    assert one.engine.health().degraded


def test_one_healthy_request_does_not_hide_that_another_has_no_selection(harness, monkeypatch):
    one = harness()
    attend = dynamic_kernel.attend

    def broken_for_one(query, cache, rows, *rest):
        found = attend(query, cache, rows, *rest)
        found.coverage[rows.lengths < 600] = torch.nan
        return found

    monkeypatch.setattr(dynamic_kernel, "attend", broken_for_one)
    seen = []

    async def watch():
        long = one.generate(prompt_of(900), greedy(80))
        short = one.generate(prompt_of(300), greedy(80))

        async def look():
            while True:
                seen.append(one.engine.health().degraded)
                await asyncio.sleep(0.001)

        looking = asyncio.ensure_future(look())
        answers = await asyncio.gather(long, short)
        looking.cancel()
        return answers

    [[healthy, broken]] = one.run(watch())
    assert last(healthy).fallbacks == {}
    assert set(last(broken).fallbacks) == {"kernel_error"}
    first = seen.index(True)
    assert all(seen[first:-1])
    one.tokens(prompt_of(900), greedy(2))
    assert not one.engine.health().degraded


def test_a_sampled_step_is_audited_against_every_key(harness):
    one = harness()
    one.tokens(prompt_of(1500), greedy(3), dynamic(max_keys=143))
    for layers in ("first", "middle", "last"):
        signs = [{"layers": layers, "sign": sign} for sign in ("over", "under")]
        error = "attention_audit_coverage_error"
        assert sum(counter(one, f"{error}_count", **labels) for labels in signs) == 1
        # Codes of sixteen channels are coarse; nearer than not knowing they are all the same.
        assert 0 < sum(counter(one, f"{error}_sum", **labels) for labels in signs) < 0.3
    for phase in ("score", "select", "attend"):
        assert counter(one, "attention_seconds_count", phase=phase) == 1
        assert counter(one, "attention_seconds_sum", phase=phase) > 0


class Poisoned:
    """A model that fails whenever a step holds a given token."""

    def __init__(self, model, token, how):
        self._model, self._token, self._how = model, token, how
        self.logits = model.logits

    def __call__(self, step, caches, recorder):
        hidden = self._model(step, caches, recorder)
        bad = step.token_ids == self._token
        if bad.any():
            if self._how == "raise":
                raise RuntimeError("device-side assert")
            hidden[bad] = torch.nan
        return hidden


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("policy", [dynamic(), DENSE])
def test_a_request_that_breaks_the_model_fails_alone(harness, how, policy):
    one = harness(wrap=lambda model: Poisoned(model, 255, how))
    good = [[t % 254 + 1 for t in prompt_of(n, n)] for n in (100, 300, 700)]
    expected = [one.tokens(prompt, greedy(6), policy) for prompt in good]
    bad = [*good[0], 255]
    answers = one.run(
        one.generate(good[0], greedy(6), policy),
        one.generate(bad, greedy(6), policy, n=3),
        *(one.generate(prompt, greedy(6), policy) for prompt in good[1:]),
    )
    failed = answers.pop(1)
    assert [d.finish_reason for d in failed] == ["error"] * 3
    assert all("request" in d.error or "finite" in d.error for d in failed)
    assert [tokens_of(deltas) for deltas in answers] == expected
    assert one.engine.health().alive
    assert one.engine._scheduler.pool.usage == 0


def test_a_broken_sampler_ends_its_request_alone(harness, monkeypatch):
    one = harness()
    expected = one.tokens(prompt_of(50), greedy(6))

    def broken(scores, params):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr("service.engine.sampler._nucleus", broken)
    answers = one.run(
        one.generate(prompt_of(50), greedy(6)),
        one.generate(prompt_of(50), greedy(6, temperature=1.0)),
    )
    assert tokens_of(answers[0]) == expected
    assert [d.finish_reason for d in answers[1]] == ["error"]
    assert text_of(answers[1]) == ""


@pytest.mark.parametrize("policy", ["dynamic", "fixed"])
def test_dense_layers_attend_densely_whatever_the_policy(harness, policy):
    prompt, answers, densities = prompt_of(700, 3), [], []
    dense = harness().tokens(prompt, greedy(8), dynamic(policy="dense"))
    for layers in (0, 1, 3):
        sparsity = dynamic(policy=policy, dense_layers=layers, coverage=0.1, max_keys=64)
        one = harness()
        [deltas] = one.run(one.generate(prompt, greedy(8), sparsity))
        answers.append(tokens_of(deltas))
        densities.append(deltas[-1].sparsity.density)
    assert answers[2] == dense and densities[2] == 1.0  # of three layers
    assert densities[1] == pytest.approx((1 + 2 * densities[0]) / 3, rel=0.1)
    assert answers[0] != dense


def test_a_pattern_that_is_too_much_work_ends_its_request_alone(harness, monkeypatch):
    monkeypatch.setattr(lists, "MOST", 3)
    one = harness()
    refused, fine = one.run(
        one.generate(prompt_of(700), greedy(3), dynamic(policy="fixed", prefill="fixed")),
        one.generate(prompt_of(500), greedy(3), DENSE),
    )
    assert refused[-1].finish_reason == "error"
    assert refused[-1].error.startswith("sparsity.pattern: what this pattern shows of")
    assert fine[-1].finish_reason == "length"
    assert not one.engine.health().degraded
