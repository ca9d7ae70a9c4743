"""An answer does not depend on the batch, on chunk sizes, or on who comes and goes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from service.engine import holds
from tests.service.engine.tiny import dynamic, greedy, level, prompt_of, tokens_of

LENGTHS = [3, 64, 129, 200, 517, 900]
POLICIES = {
    "dynamic": dynamic(),
    "dynamic with a floor": dynamic(min_coverage=0.93),
    "fixed": dynamic(policy="fixed"),
    "dense": dynamic(policy="dense"),
    "sparse prompt": dynamic(prefill="dynamic", prefill_coverage=0.7),
    "sparse prompt with a floor": dynamic(
        prefill="dynamic", prefill_coverage=0.7, min_coverage=0.5
    ),
    "fixed prompt": dynamic(prefill="fixed", pattern="sinks:4+window:100"),
}


@pytest.fixture(params=list(POLICIES), scope="module")
def policy(request):
    return POLICIES[request.param]


@pytest.fixture(scope="module")
def alone():
    """What each of the prompts is answered on its own: the same for all tests of a policy."""
    known = {}

    def answers(harness, policy):
        if policy not in known:
            one = harness()
            known[policy] = [one.tokens(prompt_of(n, n), greedy(12), policy) for n in LENGTHS]
        return known[policy]

    return answers


@pytest.fixture
def harness(harness, request, monkeypatch):
    """The same, on a model whose sparse prompts leave pages unread."""
    monkeypatch.setattr(holds, "PROMPT_HOLD", 128)
    sparse = "policy" in request.fixturenames and request.getfixturevalue("policy")
    if sparse and sparse.prefill == "dynamic":
        return partial(harness, wrap=level)
    return harness


def test_sparse_prompts_leave_pages_and_fall_back_here_and_there(harness):
    for name, least in (("sparse prompt", 0), ("sparse prompt with a floor", 64)):
        one = harness(wrap=level)
        [deltas] = one.run(one.generate(prompt_of(900, 900), greedy(2), POLICIES[name]))
        report = deltas[-1].sparsity
        assert 0 < report.prefill.density < 0.99
        assert least <= report.fallbacks.get("low_coverage", 0) < 600


def test_greedy_answers_are_the_same_in_company_and_in_any_chunks(harness, alone, policy):
    expected = alone(harness, policy)
    # Tokens one by one take as many steps as the longest prompt has: not of all lengths.
    for chunk, step, count in ((512, 1024, 6), (7, 160, 6), (64, 137, 6), (1, 136, 4)):
        many = harness(prefill_chunk=chunk, step_tokens=step)
        answers = many.run(
            *(
                many.generate(prompt_of(n, n), greedy(12), policy, delay=0.01 * i)
                for i, n in enumerate(LENGTHS[:count])
            )
        )
        assert [tokens_of(deltas) for deltas in answers] == expected[:count]


def test_greedy_answers_survive_preemption(harness, alone, policy):
    expected = alone(harness, policy)
    # 20 pages hold the longest alone, not all of them: sequences are put back and recomputed.
    tight = harness(pages=20, prefill_chunk=100, max_model_len=1200)
    prompts = [prompt_of(n, n) for n in LENGTHS]
    answers = tight.run(*(tight.generate(p, greedy(12), policy) for p in prompts))
    assert [tokens_of(deltas) for deltas in answers] == expected
    # Two prompts have room, and then have not: each ends on four pages.
    crowd = harness(pages=7, prefill_chunk=100, max_model_len=448)
    prompts, long = [prompt_of(120, seed) for seed in (1, 2)], [greedy(90), policy]
    first = crowd.tokens(prompts[0], *long)
    pair = crowd.run(*(crowd.generate(prompt, *long) for prompt in prompts))
    preempted = crowd.engine.metrics.registry.get_sample_value(
        "saccade_num_preemptions_total", {"model_name": "tiny"}
    )
    assert preempted == crowd.engine._scheduler.preemptions > 0
    assert tokens_of(pair[0]) == first
    assert tokens_of(pair[1]) == harness().tokens(prompts[1], *long)


def test_greedy_answers_survive_others_being_cancelled(harness, alone, policy):
    expected = alone(harness, policy)
    many = harness(prefill_chunk=90, step_tokens=300)

    async def cancelled(seed):
        stream = many.engine.submit(
            prompt_of(700, seed), greedy(300), policy, request_id=f"cancelled{seed}"
        )
        async for _ in stream:
            break
        stream.close()

    answers = many.run(
        *(
            call
            for i, n in enumerate(LENGTHS)
            for call in (
                many.generate(prompt_of(n, n), greedy(12), policy, delay=0.02 * i),
                cancelled(i),
            )
        )
    )
    assert [tokens_of(deltas) for deltas in answers[::2]] == expected
    assert many.engine._scheduler.pool.usage == 0


def test_every_choice_of_a_greedy_request_is_the_single_answer(harness, policy):
    one = harness()
    for length in (1, 64, 65, 300):
        prompt = prompt_of(length, length)
        expected = one.tokens(prompt, greedy(9), policy)
        [deltas] = one.run(one.generate(prompt, greedy(9), policy, n=3))
        assert [tokens_of(deltas, index) for index in range(3)] == [expected] * 3
    assert one.engine._scheduler.pool.usage == 0


def test_float32_agrees_with_float64_wherever_the_margin_is_clear(harness):
    """Step by step: where the two best logits differ by more than 1e-4, batches agree.

    A sample is left out: where a sum rounds otherwise, a mark can fall on the next key.
    """
    margins, policy = {}, dynamic(sampled=False)

    def watch(model):
        def logits(hidden):
            scores = model.logits(hidden)
            best = scores.topk(2, dim=-1).values
            for row, (first, second) in zip(hidden, best.tolist(), strict=True):
                margins.setdefault(len(margins), (row, first - second))
            return scores

        return Watched(model, logits)

    single = harness(dtype=torch.float32, wrap=watch)
    for length in LENGTHS:
        margins.clear()
        expected = single.tokens(prompt_of(length, length), greedy(12), policy)
        clear = next((i for i, (_, gap) in margins.items() if gap <= 1e-4), len(expected))
        many = harness(dtype=torch.float32, prefill_chunk=50, step_tokens=200)
        answers = many.run(
            many.generate(prompt_of(length, length), greedy(12), policy),
            *(many.generate(prompt_of(n, 7), greedy(12), policy) for n in LENGTHS),
        )
        assert tokens_of(answers[0])[:clear] == expected[:clear]


class Watched:
    """A model whose logits are looked at on their way out."""

    def __init__(self, model, logits):
        self._model, self.logits = model, logits

    def __call__(self, *args):
        return self._model(*args)


def test_a_full_budget_answers_like_dense(harness):
    one = harness()
    for length in LENGTHS:
        prompt = prompt_of(length, length)
        everything = dynamic(coverage=1.0, min_keys=4096, max_keys=4096)
        dense = one.tokens(prompt, greedy(20), POLICIES["dense"])
        assert one.tokens(prompt, greedy(20), everything) == dense
