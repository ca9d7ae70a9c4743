"""What the prefix cache finds, and that an answer is the same whether it does or not."""

from __future__ import annotations

import asyncio
import math
from functools import partial

import pytest
import torch

from kernels import prefill
from models import attention
from service.engine import holds
from service.engine.scheduler import Scheduler
from service.engine.types import Explain
from tests.service.engine.test_fallbacks import Poisoned, counter, fail, last
from tests.service.engine.tiny import (
    dynamic,
    greedy,
    level,
    prompt_of,
    tiny_config,
)

SHARED = prompt_of(700, 5)
FIRST = [*SHARED, *prompt_of(220, 6)]
SECOND = [*SHARED, *prompt_of(131, 7)]
SPARSE = dynamic(prefill="dynamic", prefill_coverage=0.7)
POLICIES = {
    "dynamic": dynamic(),
    "dense": dynamic(policy="dense"),
    "sparse prompt": SPARSE,
    "sparse prompt with a floor": dynamic(
        prefill="dynamic", prefill_coverage=0.7, min_coverage=0.5
    ),
    "fixed prompt": dynamic(policy="fixed", prefill="fixed", pattern="sinks:4+window:100"),
    "random prompt": dynamic(prefill="fixed", pattern="window:64+random:4,3+strided:96"),
    "explained": dynamic(explain=Explain(tokens=True)),
}
MODELS = {
    "windows": tiny_config(windows=(96, None, 200)),
    "own patterns": tiny_config(patterns=(("window:70", "strided:64"),) * 3),
}


@pytest.fixture(autouse=True)
def short_holds(monkeypatch):
    monkeypatch.setattr(holds, "PROMPT_HOLD", 128)


@pytest.fixture
def harness(harness):
    """Engines on a model whose sparse prompts leave pages unread."""
    return partial(harness, wrap=level)


def found(one):
    """Prompt tokens looked up and found so far."""
    return tuple(counter(one, f"prefix_cache_{name}_total") for name in ("queries", "hits"))


def cached(deltas):
    return sum(delta.cached_tokens for delta in deltas)


def whole(prompt):
    """Tokens of a prompt's pages before its tail."""
    return max(0, len(prompt) - 128) // 64 * 64


def numbers(deltas):
    """The log-probabilities and reports of an answer."""
    found = [entry.logprob for delta in deltas for entry in delta.logprobs]
    for report in (delta.sparsity for delta in deltas if delta.sparsity is not None):
        found += [report.density, report.coverage, report.coverage_p5, report.keys_attended]
        if report.prefill is not None:
            found += [report.prefill.density, report.prefill.coverage]
        found += [span.mass for span in report.attended or ()]
    return [math.nan if value is None else value for value in found]


def words(deltas):
    """All else that a caller is told, but for what was cached."""
    return [
        (delta.index, delta.text, delta.token_ids, delta.finish_reason)
        + ((delta.sparsity.fallbacks, delta.sparsity.policy) if delta.sparsity else ())
        + (tuple(head.positions[0] for head in delta.look.heads) if delta.look else ())
        for delta in sorted(deltas, key=lambda delta: delta.index)
    ]


def same(deltas, expected):
    assert words(deltas) == words(expected)
    assert numbers(deltas) == pytest.approx(numbers(expected), abs=1e-8, nan_ok=True)
    return True


def ask(one, prompt, policy, n=1, tokens=6):
    [deltas] = one.run(one.generate(prompt, greedy(tokens, logprobs=2), policy, n=n))
    return deltas


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_and_reports_are_the_same_cold_warm_and_without_a_cache(harness, policy):
    policy = POLICIES[policy]
    off = harness(prefix_cache=False)
    expected = {len(p): ask(off, p, policy) for p in (FIRST, SECOND, FIRST[:300])}
    assert found(off) == (0, 0)
    for chunk in (512, 150):
        on = harness(prefill_chunk=chunk)
        cold = ask(on, FIRST, policy)
        assert same(cold, expected[len(FIRST)]) and cached(cold) == 0
        falls = set(last(cold).fallbacks) & {"low_coverage"} and policy.prefill == "dynamic"
        for prompt in (SECOND, FIRST[:300], FIRST):
            warm = ask(on, prompt, policy)
            same(warm, expected[len(prompt)])
            most = min(whole(prompt), 640 if prompt is SECOND else whole(FIRST))
            assert cached(warm) == most or (falls and 0 < cached(warm) < most)
        assert on.engine._scheduler.pool.usage == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["dynamic", "sparse prompt", "fixed prompt"])
def test_so_they_are_on_models_with_windows_and_with_patterns_of_their_own(harness, name, policy):
    off, on = (harness(prefix_cache=kept, config=MODELS[name]) for kept in (False, True))
    ask(on, FIRST, POLICIES[policy])
    warm = ask(on, SECOND, POLICIES[policy])
    same(warm, ask(off, SECOND, POLICIES[policy]))
    assert cached(warm) == 640


def test_so_they_are_in_company_and_when_they_are_put_back(harness):
    policy = POLICIES["sparse prompt with a floor"]
    prompts = [SHARED[:330], [*SHARED[:300], *prompt_of(60, 1)], prompt_of(90), SHARED[:420]]
    off = harness(prefix_cache=False)
    expected = [ask(off, prompt, policy, tokens=70) for prompt in prompts]
    # The last takes 8 pages in the end, of which 4 may be shared: all of them need 19 or more.
    for pages in (400, 14):
        on = harness(pages=pages, max_seqs=4, prefill_chunk=100, max_model_len=640)
        answers = on.run(
            *(
                on.generate(prompt, greedy(70, logprobs=2), policy, delay=0.01 * number)
                for number, prompt in enumerate([*prompts, *prompts])
            )
        )
        assert all(map(same, answers, [*expected, *expected]))
        assert found(on)[1] > 0
        assert on.engine._scheduler.pool.usage == 0
    assert on.engine._scheduler.preemptions > 0


def test_whole_pages_before_the_tail_are_found_and_no_part_of_one(harness):
    one = harness()
    ask(one, SHARED, dynamic(), tokens=1)
    for length in (64, 191, 192, 193, 256, 700):
        assert (
            cached(ask(one, SHARED[:length], dynamic(), tokens=1))
            == max(0, length - 128) // 64 * 64
        )
    for differs in (0, 63, 64, 200):
        other = [*SHARED[:differs], SHARED[differs] % 255 + 1, *SHARED[differs + 1 :]]
        fresh = harness()
        ask(fresh, SHARED, dynamic(), tokens=1)
        assert cached(ask(fresh, other, dynamic(), tokens=1)) == min(differs // 64 * 64, 512)


def test_tokens_are_counted_as_looked_up_and_found(harness):
    one = harness()
    ask(one, FIRST, dynamic())
    assert found(one) == (len(FIRST), 0)
    ask(one, SECOND, dynamic(), n=3)
    assert found(one) == (len(FIRST) + len(SECOND), 640)
    assert counter(one, "prompt_tokens_total") == len(FIRST) + len(SECOND)
    assert counter(one, "kv_cache_usage_perc") == 0


DIFFERENT = {
    "dense": (SPARSE, dynamic()),
    "another coverage": (SPARSE, dynamic(prefill="dynamic", prefill_coverage=0.8)),
    "a floor": (SPARSE, dynamic(prefill="dynamic", prefill_coverage=0.7, min_coverage=0.1)),
    "dense layers": (SPARSE, dynamic(prefill="dynamic", prefill_coverage=0.7, dense_layers=1)),
    "a pattern": (SPARSE, dynamic(prefill="fixed")),
    "another pattern": (
        dynamic(prefill="fixed"),
        dynamic(prefill="fixed", pattern="sinks:4+window:65"),
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_prompts_that_attend_otherwise_find_nothing(harness, what):
    prompt = FIRST[:450]
    for before, after in (DIFFERENT[what], DIFFERENT[what][::-1]):
        one = harness()
        ask(one, prompt, before, tokens=1)
        assert cached(ask(one, prompt, after, tokens=1)) == 0
        assert cached(ask(one, prompt, before, tokens=1)) == whole(prompt)


def test_what_has_no_part_in_a_prompts_keys_is_of_no_matter(harness):
    one = harness()
    ask(one, FIRST, dynamic(), tokens=1)
    for other in (
        dynamic(policy="dense", dense_layers=2, min_coverage=0.5),
        dynamic(policy="fixed", pattern="window:99", coverage=0.5, max_keys=300),
        dynamic(explain=Explain(tokens=False), sampled=False, prefill_coverage=0.1),
    ):
        assert cached(ask(one, FIRST, other, tokens=1)) == whole(FIRST)


def test_where_a_sparse_prompt_is_dense_for_being_short_it_is_a_dense_one(harness):
    one = harness(prefill_dense_below=300)
    ask(one, FIRST, dynamic(), tokens=1)
    sparse = ask(one, FIRST, SPARSE)
    assert cached(sparse) == 320
    off = harness(prefill_dense_below=300, prefix_cache=False)
    same(sparse, ask(off, FIRST, SPARSE))
    assert last(sparse).fallbacks["short_context"] == 320


def test_what_fell_back_for_low_coverage_is_not_found_as_what_was_asked_for(harness):
    policy = POLICIES["sparse prompt with a floor"]
    one = harness()
    cold = ask(one, FIRST, policy)
    assert 128 <= last(cold).fallbacks["low_coverage"] < whole(FIRST)
    warm = ask(one, FIRST, policy)
    assert 0 < cached(warm) < whole(FIRST)
    same(warm, cold)


def test_what_came_of_a_failed_kernel_is_not_kept(harness, monkeypatch):
    one, choose, calls = harness(prefill_chunk=256), attention.choose, []

    def fail_later(*args):
        calls.append(1)
        return fail() if len(calls) > 3 else choose(*args)  # three layers: behind the first chunk

    with monkeypatch.context() as patch:
        patch.setattr(attention, "choose", fail_later)
        assert set(last(ask(one, FIRST, SPARSE)).fallbacks) == {"kernel_error"}
    again = ask(one, FIRST, SPARSE)
    assert cached(again) == 256
    same(again, ask(harness(prefix_cache=False), FIRST, SPARSE))
    # Dense though it was, behind the sparse part it is no dense prompt's.
    assert cached(ask(one, FIRST, dynamic(), tokens=1)) == 0


def test_scores_that_are_no_numbers_keep_nothing(harness, monkeypatch):
    one, attend = harness(), prefill.tile_attention

    def broken(*args):
        output, lse, own = attend(*args)
        return output, lse, torch.full_like(own, torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "tile_attention", broken)
        ask(one, FIRST, SPARSE)
    # All of it was dense from the first page on, and yet it is no dense prompt's.
    assert cached(ask(one, FIRST, dynamic(), tokens=1)) == 0
    assert cached(ask(one, FIRST, SPARSE)) == 0


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_pages_that_are_not_finite_are_not_kept(harness, what, number):
    class Spoils:
        """Breaks the fourth page of a prompt as it is computed, once."""

        def __init__(self, model):
            self._model, self.logits, self.done = level(model), model.logits, False

        def __call__(self, step, caches, recorder):
            hidden = self._model(step, caches, recorder)
            if not self.done and len(step.filled) > 3:
                self.done = True
                page = step.filled[3:4]
                caches[1].kv[1, page, 9, 0 if what == "key" else 1, 3] = number
                caches[1].code(page)
            return hidden

    one = harness(wrap=Spoils, prefill_chunk=300)
    ask(one, FIRST, dynamic(), tokens=1)
    again = ask(one, FIRST, dynamic())
    assert cached(again) == 192
    same(again, ask(harness(prefix_cache=False), FIRST, dynamic()))
    assert cached(ask(one, FIRST, dynamic())) == whole(FIRST)


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_step_that_failed_keeps_nothing(harness, tasks):
    one = harness(wrap=lambda model: Poisoned(level(model), 255, "raise"), prefill_chunk=256)
    prompt = [token % 254 + 1 for token in FIRST]
    sick = [*prompt[:600], 255, *prompt[601:]]
    calls = [one.generate(each, greedy(2)) for each in (sick, [7, *prompt])[:tasks]]
    [deltas, *_] = one.run(*calls)
    assert deltas[-1].finish_reason == "error"
    assert cached(ask(one, prompt, dynamic())) == 512
    assert one.engine._scheduler.pool.usage == 0


def test_salts_keep_their_prompts_to_themselves(harness):
    one = harness()

    async def ask_with(salt):
        stream = one.engine.submit(FIRST, greedy(1), dynamic(), request_id=salt, cache_salt=salt)
        return cached([delta async for delta in stream])

    salts = ["", "a", "b", "a", "b", "", "\ud800"]
    assert [one.run(ask_with(salt))[0] for salt in salts] == [0, 0, 0, *[whole(FIRST)] * 3, 0]


def test_log_probabilities_of_a_prompt_are_computed(harness):
    one = harness(prefill_chunk=200)
    ask(one, FIRST, dynamic(), tokens=1)
    before = found(one)
    echo = greedy(3, logprobs=1, prompt_logprobs=1)
    [deltas] = one.run(one.generate(FIRST, echo))
    off = harness(prefix_cache=False)
    [expected] = off.run(off.generate(FIRST, echo))
    ours, theirs = ([e.logprob for e in one[0].prompt_logprobs[1:]] for one in (deltas, expected))
    assert ours == pytest.approx(theirs, abs=1e-8) and len(ours) == len(FIRST) - 1
    assert cached(deltas) == 0 and found(one) == before
    # What such a request computes others find.
    [_] = one.run(one.generate(SECOND[650:], echo))
    assert cached(ask(one, SECOND[650:], dynamic(), tokens=1)) == whole(SECOND[650:])


@pytest.mark.parametrize("slots", [1, 8])
def test_choices_share_what_was_found(harness, slots):
    one = harness(max_seqs=slots)
    expected = ask(harness(prefix_cache=False, max_seqs=slots), SECOND, SPARSE, n=3)
    ask(one, FIRST, SPARSE, tokens=1)
    warm = ask(one, SECOND, SPARSE, n=3)
    same(warm, expected)
    assert cached(warm) == 640


@pytest.mark.parametrize("policy", ["dynamic", "sparse prompt", "fixed prompt"])
def test_requests_that_come_together_compute_once_what_they_share(harness, policy):
    policy, off, on = POLICIES[policy], harness(prefix_cache=False), harness(prefill_chunk=128)
    prompts = [FIRST, SECOND, [*SHARED, *prompt_of(150, 8)], SHARED[:500]]
    expected = [ask(off, prompt, policy) for prompt in prompts]
    answers = on.run(*(on.generate(prompt, greedy(6, logprobs=2), policy) for prompt in prompts))
    assert all(map(same, answers, expected))
    assert sorted(map(cached, answers)) == [0, whole(SHARED[:500]), 640, 640]
    assert found(on) == (sum(map(len, prompts)), whole(SHARED[:500]) + 1280)
    assert on.engine._scheduler.pool.usage == 0


def test_a_prompt_that_was_given_up_leaves_what_was_computed_of_it(harness):
    one = harness(prefill_chunk=64, step_tokens=200)

    async def leave():
        stream = one.engine.submit(FIRST, greedy(9), dynamic(), request_id="left")
        while one.engine.prefilled("left") < 256:
            await asyncio.sleep(0.001)
        stream.close()
        while one.engine._scheduler.pool.usage > 0:
            await asyncio.sleep(0.001)

    one.run(leave())
    assert 256 <= cached(ask(one, FIRST, dynamic())) <= whole(FIRST)


def test_a_sequence_that_was_put_back_finds_its_own_pages(harness, monkeypatch):
    """Those, too, that fell back, which nobody else looks for."""
    policy = POLICIES["sparse prompt with a floor"]
    expected = ask(harness(prefix_cache=False), FIRST, policy)
    schedule, starts = Scheduler.schedule, []

    def disturbed(self):
        for sequence in list(self.running):
            if sequence.computed >= 512 and not starts:
                self._put_back(sequence)
                starts.append(None)
        work = schedule(self)
        starts.extend(item.start for item in work if starts == [None])
        return work

    monkeypatch.setattr(Scheduler, "schedule", disturbed)
    one = harness(prefill_chunk=256)
    deltas = ask(one, FIRST, policy)
    same(deltas, expected)
    assert starts == [None, 512]
    assert cached(deltas) == 0  # when it came there was nothing


def test_queued_tokens_are_those_that_must_be_computed(harness):
    one = harness(max_seqs=1, prefill_chunk=64)
    ask(one, FIRST, dynamic(), tokens=1)
    engine, seen = one.engine, []
    report = engine._report_load

    def reported():
        report()
        seen.append((engine.load().queued_tokens, len(engine._scheduler.waiting)))

    engine._report_load = reported
    one.run(*(one.generate(prompt, greedy(4)) for prompt in (FIRST, SECOND, FIRST)))
    # One runs: of the two that wait the ends of their prompts are left.
    assert max(queued for queued, _ in seen) <= 2 * (len(FIRST) - whole(FIRST)) + len(SECOND) - 640
    assert max(waiting for _, waiting in seen) == 2
