"""The sample is what its definition says, stands for all keys, and misses no part of a text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import budget, dynamic, reference, sample
from kernels.attention import Impl, dense_decode, selected_attention
from kernels.policy import Dynamic

SCALE = 0.25


def shares(seed, keys, sharpness):
    """Shares of 3 rows and 2 KV heads, with ties, some of which may not be drawn."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(3, 2, keys, generator=generator) * sharpness).mul(4).round().div(4)
    share = scores.double().softmax(-1)
    free = torch.rand(3, 2, keys, generator=generator) < 0.9
    return share, free, generator


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_budget_is_the_reference_budget(data):
    n = data.draw(st.integers(1, 300))
    share, free, _ = shares(
        data.draw(st.integers(0, 10**6)), n, data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    )
    always = (~free).sum(-1)
    held = share.masked_fill(free, 0).sum(-1)
    most = data.draw(st.integers(1, 400))
    least = data.draw(st.integers(0, most))
    # Targets that no sum of equal shares meets exactly, whatever the order of the sum.
    coverage = data.draw(st.sampled_from([0.4987, 0.9013, 0.9999]))
    worth = data.draw(st.sampled_from([0.0, 1.03, 2.1]))
    sampled = data.draw(st.booleans())
    policy = Dynamic(coverage=coverage, min_keys=least, max_keys=most, worth=worth, sampled=sampled)
    visible = torch.tensor([n, n + 7, 2 * n])
    actual = budget.wanted_keys(share.masked_fill(~free, -1), held, always, visible, policy)
    for row in range(3):
        for head in range(2):
            expected = reference.wanted_keys(
                share[row, head][free[row, head]],
                float(held[row, head]),
                int(always[row, head]),
                coverage,
                least,
                most,
                worth / int(visible[row]),
                budget.SAMPLE if sampled else 0,
            )
            assert int(actual[row, head]) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sample_is_the_reference_sample(data):
    n = data.draw(st.integers(1, 200))
    share, free, generator = shares(
        data.draw(st.integers(0, 10**6)), n, data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    )
    number = torch.rand(2, n, generator=generator, dtype=torch.float64) + 1e-9
    if data.draw(st.booleans()):
        number = torch.ones_like(number)  # of ties the first are drawn
    wanted = torch.randint(0, n + 1, (3, 2), generator=generator).minimum(free.sum(-1))
    most = int(wanted.max()) + data.draw(st.integers(0, 5))
    chosen, threshold = sample.draw(share.masked_fill(~free, -1), number, wanted, most)
    weight = sample.log_weight(share, threshold)
    for row in range(3):
        for head in range(2):
            place = free[row, head].nonzero()[:, 0]
            drawn, stands = reference.draw(
                share[row, head][place], number[head][place], int(wanted[row, head])
            )
            assert torch.equal(chosen[row, head].nonzero()[:, 0], place[drawn])
            torch.testing.assert_close(weight[row, head][place[drawn]].exp(), stands)


def test_sums_over_the_sample_are_right_on_average():
    """Whatever is summed, and however wrong the shares are."""
    generator = torch.Generator().manual_seed(0)
    keys, times, wanted = 400, 4000, 40
    share = (torch.randn(keys, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)
    value = share * torch.randn(keys, generator=generator, dtype=torch.float64).exp()
    number = torch.rand(times, keys, generator=generator, dtype=torch.float64)
    count = torch.full((1, times), wanted)
    chosen, threshold = sample.draw(share.expand(1, times, -1), number, count, wanted)
    stands = sample.log_weight(share.expand(1, times, -1), threshold).exp() * chosen
    for one in (value, torch.ones(keys, dtype=torch.float64)):
        sums = (stands * one).sum(-1)[0]
        assert (sums.mean() - one.sum()).abs() < 4 * sums.std() / times**0.5
    assert (stands * value).sum(-1).std() < 0.3 * value.sum()


def test_numbers_are_fixed_and_spread_over_every_stretch():
    number = sample.uniform(torch.arange(100_000), 3)
    assert number.dtype is torch.float32
    assert float(number.min()) > 0 and float(number.max()) < 1
    assert torch.equal(sample.uniform(torch.arange(5000, 5100), 3), number[:, 5000:5100])
    for head in range(3):
        for start in (0, 12_345, 99_000):
            counts = torch.histc(number[head, start : start + 1000], 20, 0, 1)
            assert 46 <= int(counts.min()) <= int(counts.max()) <= 54
    assert (number[0] - number[1]).abs().min() > 0.1  # no two heads draw the same keys


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
@pytest.mark.parametrize("gain", [0.5, 1.0])
def test_a_sample_comes_nearer_to_dense_attention_than_the_greatest_keys(paged, impl, gain):
    """Where values follow the keys, those of the greatest mass are no sample of all."""
    case = paged([8192], 4, 64, queries=4)
    direction = torch.randn(64, generator=case.generator)
    keys = case.cache.kv[..., 0, :]
    case.cache.kv[..., 1, :] = (keys @ direction / 8)[..., None] + case.cache.kv[..., 1, :] / 8
    query = case.query(2) * gain
    dense, _ = dense_decode(query, case.cache, case.rows, 0.125)
    errors = []
    for sampled in (True, False):
        policy = Dynamic(coverage=1.0, min_keys=512, max_keys=512, sampled=sampled)
        choice = dynamic.select(query, case.cache, case.rows, policy, 0.125, impl=impl)
        output, *_ = selected_attention(query, case.cache, case.rows, choice.selection, 0.125, impl)
        errors.append(float((output - dense).norm()))
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
def test_a_sample_of_level_attention_stands_for_the_whole_context(paged, impl):
    case = paged([4096], 2, 32)
    case.cache.kv[..., 0, :] = 0.0
    case.cache.code(torch.tensor(case.tables[0]))
    policy = Dynamic(coverage=1.0, min_keys=512, max_keys=512)
    query = case.query(2)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
    _, lse, own = selected_attention(query, case.cache, case.rows, choice.selection, SCALE, impl)
    total = torch.full_like(lse, 4096).log()
    torch.testing.assert_close(lse, total, atol=5e-3, rtol=0)
    torch.testing.assert_close(own, torch.full_like(own, 512).log(), atol=1e-4, rtol=0)
    torch.testing.assert_close(choice.coverage(lse, own), torch.full_like(own, 1 / 8))
