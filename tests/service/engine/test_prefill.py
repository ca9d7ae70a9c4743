"""Prompts that attend sparsely: what is reported of it, and what happens when it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import prefill
from kernels.errors import KernelError
from kernels.patterns.pattern import Pattern
from models import attention
from tests.service.engine.test_fallbacks import counter, last
from tests.service.engine.tiny import dynamic, greedy, prompt_of, tokens_of

DENSE = dynamic()
SPARSE = dynamic(prefill="dynamic", prefill_coverage=0.7)
LENGTH = 1500
BODY = LENGTH - 128


def level(decoder):
    """The model with smaller queries: its attention is level enough to leave pages."""
    for layer in decoder.model.layers:
        layer.self_attn.q_proj.weight.mul_(0.15)
    return decoder


def run(harness, sparsity, **settings):
    one = harness(wrap=level, **settings)
    [deltas] = one.run(one.generate(prompt_of(LENGTH), greedy(12), sparsity))
    return one, deltas


def test_a_sparse_prompt_is_reported_apart_from_the_answer(harness):
    one, deltas = run(harness, SPARSE)
    report = last(deltas)
    assert report.prefill.policy == "dynamic"
    assert 0.05 < report.prefill.density < 0.7
    assert 0.3 < report.prefill.coverage < 1.0
    assert report.fallbacks == {}
    assert counter(one, "prefill_attention_density_count") == 3  # chunks of 512, 512, 348
    assert last(run(harness, DENSE)[1]).prefill.density == 1.0


def test_what_a_prompt_reads_does_not_depend_on_its_chunks(harness):
    expected = run(harness, SPARSE)[1]
    for chunk, step in ((64, 136), (200, 1024), (4096, 4096)):
        deltas = run(harness, SPARSE, prefill_chunk=chunk, step_tokens=step)[1]
        assert tokens_of(deltas) == tokens_of(expected)
        assert last(deltas).coverage == pytest.approx(last(expected).coverage, abs=1e-9)


def test_a_prompt_that_is_all_tail_has_nothing_to_report(harness):
    one = harness()
    [deltas] = one.run(one.generate(prompt_of(100), greedy(3), SPARSE))
    assert last(deltas).prefill is None


def test_short_positions_are_dense(harness):
    _, deltas = run(harness, SPARSE, prefill_dense_below=4096)
    dense = run(harness, DENSE)[1]
    assert tokens_of(deltas) == tokens_of(dense)
    assert last(deltas).prefill.density == 1.0
    some = last(run(harness, SPARSE, prefill_dense_below=600)[1]).prefill
    assert last(run(harness, SPARSE)[1]).prefill.density < some.density < 1.0


def test_all_of_the_mass_is_dense_attention(harness):
    every = run(harness, dynamic(prefill="dynamic", prefill_coverage=1.0))[1]
    assert tokens_of(every) == tokens_of(run(harness, DENSE)[1])
    assert last(every).prefill.density == pytest.approx(1.0)
    assert last(every).prefill.coverage == pytest.approx(1.0)


def test_a_pattern_that_shows_everything_is_dense_attention(harness):
    fixed = run(harness, dynamic(prefill="fixed", pattern="window:4000"))[1]
    assert tokens_of(fixed) == tokens_of(run(harness, DENSE)[1])
    assert last(fixed).prefill.density == pytest.approx(1.0)
    assert last(fixed).prefill.coverage is None


def test_a_pattern_reads_as_many_keys_as_it_names(harness):
    text = "sinks:4+window:100"
    report = last(run(harness, dynamic(prefill="fixed", pattern=text))[1])
    shares = []  # of each chunk, weighted by its tokens
    for start, stop in ((0, 512), (512, 1024), (1024, BODY)):
        seen = Pattern.parse(text).selected_keys(stop) - Pattern.parse(text).selected_keys(start)
        visible = (stop * (stop + 1) - start * (start + 1)) / 2
        shares.append((stop - start) * seen / visible)
    assert report.prefill.density == pytest.approx(sum(shares) / BODY)


def test_dense_layers_stay_dense(harness):
    some = last(run(harness, replace(SPARSE, dense_layers=1))[1]).prefill.density
    assert some == pytest.approx(
        (1 + 2 * last(run(harness, SPARSE)[1]).prefill.density) / 3, abs=0.1
    )


def test_a_chunk_that_fails_goes_on_densely(harness, monkeypatch):
    def fail(*args):
        raise KernelError("launch failed")

    expected = tokens_of(run(harness, DENSE)[1])
    monkeypatch.setattr(attention, "choose", fail)
    one, deltas = run(harness, SPARSE)
    assert tokens_of(deltas) == expected
    assert last(deltas).fallbacks == {"kernel_error": BODY}
    assert counter(one, "attention_fallback_total", reason="kernel_error", to="dense") == BODY
    assert one.engine.health().degraded


def test_a_failed_chunk_stays_dense_when_it_is_computed_again(harness, monkeypatch):
    calls = []
    choose = prefill.choose

    def fail_once(query, cache, segment, *args):
        calls.append(segment.start)
        if len(calls) == 4:  # the second chunk's first layer
            raise KernelError("launch failed")
        return choose(query, cache, segment, *args)

    monkeypatch.setattr(attention, "choose", fail_once)
    _, deltas = run(harness, SPARSE)
    assert last(deltas).fallbacks == {"kernel_error": 512}
    assert calls[4:] == [1024] * 3  # the second chunk is not tried again


def test_scores_that_are_no_numbers_go_dense(harness, monkeypatch):
    expected = tokens_of(run(harness, DENSE)[1])
    attend = prefill.tile_attention

    def broken(*args):
        output, lse, own = attend(*args)
        return output, lse, torch.full_like(own, torch.nan)

    monkeypatch.setattr(attention, "tile_attention", broken)
    _, deltas = run(harness, SPARSE)
    assert tokens_of(deltas) == expected
    assert last(deltas).fallbacks == {"kernel_error": BODY}
    assert last(deltas).prefill.density == 1.0


def test_coverage_under_the_requests_floor_goes_dense(harness):
    _, deltas = run(harness, replace(SPARSE, min_coverage=1.0))
    expected = run(harness, replace(DENSE, min_coverage=1.0))[1]
    assert tokens_of(deltas) == tokens_of(expected)
    assert last(deltas).fallbacks["low_coverage"] == BODY + 128 + 11
    assert last(deltas).prefill.density == 1.0


def test_choices_share_what_their_prompt_did(harness):
    one = harness(wrap=level)
    [deltas] = one.run(one.generate(prompt_of(LENGTH), greedy(3), SPARSE, n=2))
    first, second = (delta.sparsity for delta in deltas if delta.sparsity is not None)
    assert first.prefill == second.prefill is not None
