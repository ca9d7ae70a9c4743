"""The sampler against the definitions of its parameters."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from service.engine.sampler import Sampler, rank, rank_in_slices
from tests.service.engine.tiny import greedy

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])


def sampler(prompt=(0,), index=0, vocab=5, ends=frozenset({4}), **params):
    return Sampler(greedy(**({"max_tokens": 9} | params)), prompt, index, vocab, ends)


def draws(count=4000, **params):
    counts = Counter()
    for seed in range(count):
        counts[sampler(**({"temperature": 1.0, "seed": seed} | params)).sample(LOGITS, 0)] += 1
    return torch.tensor([counts[i] / count for i in range(5)])


def test_greedy_takes_the_best():
    assert sampler().sample(LOGITS, 0) == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = (LOGITS / temperature).softmax(0)
    assert (draws(temperature=temperature) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {3, 2}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {3}),
        ({"top_p": 0.7}, {3, 2}),
        ({"top_p": 1e-9}, {3}),
        ({"min_p": 0.3}, {3, 2}),
        ({"min_p": 1.0}, {3}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.1}, {3, 2, 1}),
    ],
)
def test_cuts_keep_exactly_the_tokens_they_should(params, kept):
    shares = draws(**params)
    assert {i for i in range(5) if shares[i] > 0} == kept
    expected = torch.where(torch.tensor([i in kept for i in range(5)]), LOGITS.softmax(0), 0.0)
    assert (shares - expected / expected.sum()).abs().max() < 0.03


def test_a_seed_fixes_the_answer_and_choices_differ():
    def answer(**params):
        one = sampler(temperature=1.5, **params)
        return [one.sample(LOGITS, i) for i in range(30)]

    assert answer(seed=5) == answer(seed=5)
    assert answer(seed=5) != answer(seed=5, index=1)
    assert answer(seed=None) != answer(seed=None)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 9e-6])
def test_a_vanishing_temperature_is_greedy(temperature):
    assert sampler(temperature=temperature).sample(LOGITS, 0) == int(LOGITS.argmax())


def test_repetition_penalty_weighs_on_prompt_and_answer():
    one = sampler(prompt=(3,), repetition_penalty=2.0)
    assert one.sample(LOGITS, 0) == 2  # 3 / 2 < 2
    assert one.sample(LOGITS, 1) == 3  # 2 / 2 < 3 / 2
    negative = sampler(prompt=(0,), repetition_penalty=2.0)
    assert negative.sample(torch.tensor([-1.0, -1.5, -9.0, -9.0, -9.0]), 0) == 1


def test_presence_and_frequency_weigh_on_the_answer_alone():
    presence = sampler(prompt=(3,), presence_penalty=1.5)
    assert [presence.sample(LOGITS, i) for i in range(4)] == [3, 2, 3, 3]
    frequency = sampler(prompt=(3,), frequency_penalty=0.75)
    assert [frequency.sample(LOGITS, i) for i in range(4)] == [3, 3, 2, 3]


def test_bias_moves_logits_and_min_tokens_bars_every_end():
    assert sampler(logit_bias=((0, 5.0), (3, -100.0))).sample(LOGITS, 0) == 0
    end = torch.tensor([0.0, 1.0, 2.0, 8.0, 9.0])
    one = sampler(min_tokens=2, stop_token_ids=(3,))
    assert [one.sample(end, i) for i in range(3)] == [2, 2, 4]


def test_log_probabilities_are_the_models_own():
    [entry] = rank(LOGITS[None], torch.tensor([1]), 2)
    logprobs = LOGITS.log_softmax(0)
    assert entry.token == 1 and entry.logprob == pytest.approx(float(logprobs[1]))
    assert [token for token, _ in entry.top] == [3, 2]
    [none] = rank(LOGITS[None], torch.tensor([1]), 0)
    assert none.top == ()


def test_slices_rank_like_the_whole():
    hidden = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(100) % 5
    whole = rank(hidden * 2, tokens, 3)
    assert rank_in_slices(lambda h: h * 2, hidden, tokens, 3, rows=7) == whole
