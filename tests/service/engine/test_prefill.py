"""Prompts that attend sparsely: what is reported of it, and what happens when it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import prefill
from kernels.errors import KernelError
from kernels.patterns.pattern import Pattern
from models import attention
from service.engine import holds, trouble
from service.engine.scheduler import Scheduler, Work
from service.engine.sequence import Fallback, Mode, Request, Sequence
from tests.service.engine.test_fallbacks import Poisoned, counter, fail, last
from tests.service.engine.tiny import dynamic, greedy, level, prompt_of, tokens_of

DENSE = dynamic()
SPARSE = dynamic(prefill="dynamic", prefill_coverage=0.7)
LENGTH = 1500
BODY = LENGTH - 128


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


def test_all_of_the_mass_is_dense_attention_where_a_page_has_one_query_before_the_tail(harness):
    prompt = prompt_of(20 * 64 + 1 + 128)
    one = harness(wrap=level)
    every = dynamic(prefill="dynamic", prefill_coverage=1.0)
    [deltas] = one.run(one.generate(prompt, greedy(12), every))
    assert tokens_of(deltas) == one.tokens(prompt, greedy(12), DENSE)
    assert last(deltas).prefill.density == last(deltas).prefill.coverage == 1.0


def test_a_pattern_that_shows_everything_is_dense_attention(harness):
    fixed = run(harness, dynamic(prefill="fixed", pattern="window:4000"))[1]
    assert tokens_of(fixed) == tokens_of(run(harness, DENSE)[1])
    assert last(fixed).prefill.density == pytest.approx(1.0)
    assert last(fixed).prefill.coverage is None


def test_a_pattern_reads_as_many_keys_as_it_names(harness):
    text = "sinks:4+window:100"
    shares, mask = [], Pattern.parse(text).mask(BODY, BODY)  # of each page, weighted by its tokens
    for start in range(0, BODY, 64):
        stop = min(start + 64, BODY)
        visible = (stop * (stop + 1) - start * (start + 1)) / 2
        shares.append((stop - start) * int(mask[start:stop].sum()) / visible)
    for chunk in (200, 4096):
        sparsity = dynamic(prefill="fixed", pattern=text)
        report = last(run(harness, sparsity, prefill_chunk=chunk, step_tokens=4096)[1])
        assert report.prefill.density == pytest.approx(sum(shares) / BODY)


def test_dense_layers_stay_dense(harness):
    some = last(run(harness, replace(SPARSE, dense_layers=1))[1]).prefill.density
    assert some == pytest.approx(
        (1 + 2 * last(run(harness, SPARSE)[1]).prefill.density) / 3, abs=0.1
    )


def test_a_chunk_that_fails_goes_on_densely(harness, monkeypatch):
    expected = tokens_of(run(harness, DENSE)[1])
    monkeypatch.setattr(attention, "choose", fail)
    one, deltas = run(harness, SPARSE)
    assert tokens_of(deltas) == expected
    assert last(deltas).fallbacks == {"kernel_error": BODY}
    assert counter(one, "attention_fallback_total", reason="kernel_error", to="dense") == BODY
    assert one.engine.health().degraded


def test_behind_a_failed_chunk_the_prompt_is_dense(harness, monkeypatch):
    calls = []
    choose = prefill.choose

    def fail_once(query, cache, segment, *args):
        calls.append(segment.start)
        if len(calls) == 4:  # the second chunk's first layer
            raise KernelError("launch failed")
        return choose(query, cache, segment, *args)

    monkeypatch.setattr(attention, "choose", fail_once)
    _, deltas = run(harness, SPARSE)
    assert last(deltas).fallbacks == {"kernel_error": BODY - 512}
    assert calls == [0, 0, 0, 512]  # it is not tried again, chunk after chunk


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


def fallbacks_of(one):
    return {
        reason: tokens
        for reason in ("low_coverage", "kernel_error", "short_context")
        if (tokens := counter(one, "attention_fallback_total", reason=reason, to="dense"))
    }


def test_coverage_under_the_requests_floor_goes_dense(harness):
    one, deltas = run(harness, replace(SPARSE, min_coverage=1.0))
    expected = run(harness, replace(DENSE, min_coverage=1.0))[1]
    assert tokens_of(deltas) == tokens_of(expected)
    # The first three pages read everything.
    assert last(deltas).fallbacks == {"low_coverage": BODY - 192 + 128 + 11}
    assert last(deltas).prefill.density == 1.0
    assert fallbacks_of(one) == last(deltas).fallbacks


@pytest.mark.parametrize("floor", [0.3, 0.42])
def test_what_falls_back_does_not_depend_on_the_chunks_nor_on_company(harness, monkeypatch, floor):
    monkeypatch.setattr(holds, "PROMPT_HOLD", 256)
    sparsity = replace(SPARSE, min_coverage=floor)
    expected = run(harness, sparsity)[1]
    assert 256 < last(expected).fallbacks["low_coverage"] - 139 < BODY - 256
    assert last(expected).prefill.density < 1
    for chunk, step in ((64, 136), (4096, 4096)):
        many = harness(wrap=level, prefill_chunk=chunk, step_tokens=step)
        calls = [many.generate(prompt_of(n, n), greedy(5), SPARSE) for n in (300, 900)]
        deltas, *_ = many.run(many.generate(prompt_of(LENGTH), greedy(12), sparsity), *calls)
        assert tokens_of(deltas) == tokens_of(expected)
        assert last(deltas).fallbacks == last(expected).fallbacks
        assert last(deltas).prefill.density == pytest.approx(last(expected).prefill.density)
        assert last(deltas).prefill.coverage == pytest.approx(last(expected).prefill.coverage)


def test_what_is_dense_for_being_short_is_counted_and_fails_in_no_kernel(harness, monkeypatch):
    one, deltas = run(harness, SPARSE, prefill_dense_below=600)
    assert last(deltas).fallbacks == fallbacks_of(one) == {"short_context": 640}
    monkeypatch.setattr(attention, "choose", fail)
    one, deltas = run(harness, SPARSE, prefill_dense_below=600)
    assert fallbacks_of(one) == {"short_context": 640, "kernel_error": BODY - 640}
    assert last(deltas).fallbacks == fallbacks_of(one)


@pytest.mark.parametrize("max_seqs", [1, 8])
def test_choices_share_what_their_prompt_did(harness, monkeypatch, max_seqs):
    monkeypatch.setattr(attention, "choose", fail)
    # With one sequence at a time the others find no room beside the first: they compute it again.
    one = harness(wrap=level, max_seqs=max_seqs)
    [deltas] = one.run(one.generate(prompt_of(LENGTH), greedy(3), SPARSE, n=3))
    reports = [delta.sparsity for delta in deltas if delta.sparsity is not None]
    assert [report.prefill.density for report in reports] == [1.0] * 3
    assert [report.fallbacks for report in reports] == [{"kernel_error": BODY}, {}, {}]
    assert fallbacks_of(one) == {"kernel_error": BODY}
    assert counter(one, "prefill_attention_density_count") == 3
    assert len({tuple(tokens_of(deltas, index)) for index in range(3)}) == 1


def test_a_choice_that_computes_its_prompt_again_reads_what_the_first_read(harness, monkeypatch):
    monkeypatch.setattr(holds, "PROMPT_HOLD", 256)
    sparsity = replace(SPARSE, min_coverage=0.38)
    one = harness(wrap=level, max_seqs=1)
    [deltas] = one.run(one.generate(prompt_of(LENGTH), greedy(9), sparsity, n=2))
    assert tokens_of(deltas, 1) == tokens_of(deltas, 0)
    first, second = (delta.sparsity for delta in deltas if delta.sparsity is not None)
    assert first.prefill == second.prefill
    assert first.prefill.density < 1


@pytest.mark.parametrize("sparse", [True, False])
def test_a_prompt_computed_again_in_other_chunks_is_counted_once(harness, monkeypatch, sparse):
    sparsity = replace(SPARSE, min_coverage=1.0) if sparse else DENSE
    expected = last(run(harness, sparsity)[1])
    schedule, put_back = Scheduler.schedule, []

    def disturbed(self):
        for sequence in list(self.running):
            if sequence.computed == 1024 and not put_back:
                put_back.append(sequence)
                self.limits = replace(self.limits, prefill_chunk=640)
                self._put_back(sequence)
        return schedule(self)

    monkeypatch.setattr(Scheduler, "schedule", disturbed)
    one, deltas = run(harness, sparsity)
    assert put_back
    assert last(deltas).fallbacks == expected.fallbacks
    assert last(deltas).prefill == expected.prefill
    assert fallbacks_of(one) == expected.fallbacks


def test_tokens_whose_second_try_fails_in_company_are_counted(harness, monkeypatch):
    class FailsAtTheSecondTry:
        """A model that breaks on two dense prompts at once."""

        def __init__(self, model):
            self._model, self.logits, self.broke = model, model.logits, False

        def __call__(self, step, caches, recorder):
            if len(step.dense) == 2:
                self.broke = True
                raise KernelError("out of memory")
            return self._model(step, caches, recorder)

    one = harness(wrap=FailsAtTheSecondTry)
    attend = prefill.tile_attention

    def broken(*args):
        output, lse, own = attend(*args)
        return output, lse, torch.full_like(own, torch.nan)

    monkeypatch.setattr(attention, "tile_attention", broken)
    work = []
    for number in range(2):
        prompt = tuple(prompt_of(LENGTH, number))
        request = Request("a", prompt, greedy(1), SPARSE, 0, None, 0.0)
        pages = list(range(8 * number, 8 * number + 8))
        work.append(Work(Sequence(request, 0, list(prompt), pages=pages), 0, 512))
    with torch.inference_mode():
        outcomes = one.runner.run(work)
    assert one.runner._model.broke
    assert [outcome.error for outcome in outcomes] == [None, None]
    for item in work:
        noted = []
        holds.decide(item, lambda *note, noted=noted: noted.append(note))
        assert {note[:2] for note in noted} == {(Fallback.KERNEL_ERROR, Mode.DENSE)}
        assert sum(tokens for _, _, tokens in noted) == 512
    assert one.runner.degraded == "sparse prefill met scores that are not finite"


def test_a_prompt_that_breaks_the_model_does_not_degrade_the_replica(harness):
    one = harness(wrap=lambda model: Poisoned(model, 255, "raise"))
    prompt = [token % 254 + 1 for token in prompt_of(LENGTH)]
    [deltas] = one.run(one.generate([*prompt[:100], 255, *prompt[101:]], greedy(2), SPARSE))
    assert deltas[-1].finish_reason == "error"
    assert not one.engine.health().degraded


def test_a_replica_is_not_degraded_for_good(harness, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(attention, "choose", fail)
        one, _ = run(harness, SPARSE)
        assert one.engine.health().reason == "sparse prefill failed: KernelError"
        one.tokens(prompt_of(100), greedy(2), DENSE)
        assert one.engine.health().degraded
        patch.setattr(trouble, "LASTS", 0.0)
        assert not one.engine.health().degraded
        patch.undo()
        patch.setattr(attention, "choose", fail)
        one.tokens(prompt_of(LENGTH), greedy(2), SPARSE)
        assert one.engine.health().degraded
    one.tokens(prompt_of(LENGTH), greedy(2), SPARSE)
    assert not one.engine.health().degraded
