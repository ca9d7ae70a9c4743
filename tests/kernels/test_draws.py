"""Drawn values: they say without bias what the means of pages leave out, and repair it."""

from __future__ import annotations

import pytest
import torch

from kernels import dynamic
from kernels.attention import Impl, selected_attention
from kernels.cache import LayerCache, Rows
from kernels.draws import correction
from kernels.page import PAGE
from kernels.policy import Dynamic
from kernels.reference import masked_attention

SCALE = 0.25


def of_two_kinds(pages=40, seed=0):
    """A cache in which the keys that a query likes have other values than their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    cache = LayerCache.allocate(pages, 1, 32, torch.float32, "cpu")
    keys, values = torch.randn(2, 1, pages, PAGE, 32, generator=generator)
    kind = torch.rand(1, pages, PAGE, 1, generator=generator) < 0.2
    direction = torch.randn(32, generator=generator)
    keys = keys * 0.3 + kind * direction
    values = values * 0.5 + torch.where(kind, 2.0, -1.0)
    cache.kv[:, :, :, 0], cache.kv[:, :, :, 1] = keys, values
    cache.code(torch.arange(pages))
    rows = Rows(
        torch.arange(pages)[None], torch.tensor([pages * PAGE]), torch.zeros(1, dtype=torch.int64)
    )
    query = direction.expand(1, 2, 32) * torch.tensor([0.6, 0.4])[:, None]
    return cache, rows, query.contiguous()


def exact(cache, query):
    keys, values = (cache.kv[:, :, :, i].flatten(1, 2).expand(2, -1, -1)[None] for i in (0, 1))
    mask = torch.ones(1, 2, keys.shape[2], dtype=torch.bool)
    return masked_attention(query, keys, values, mask, SCALE)[0]


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA, Impl.TRITON])
@pytest.mark.parametrize("whole", [0, 16_384])
def test_draws_repair_what_pages_means_get_wrong(impl, whole):
    cache, rows, query = of_two_kinds()
    errors = []
    for draws in (0, 256):
        policy = Dynamic(coverage=0.3, min_keys=0, max_keys=150, whole=whole, draws=draws)
        choice = dynamic.select(query, cache, rows, policy, SCALE, impl=impl)
        output, lse = selected_attention(query, cache, rows, choice.selection, SCALE, impl)
        output = choice.complete(output, choice.coverage(lse))
        errors.append(float((output - exact(cache, query)).abs().mean()))
        read = choice.read(rows.visible)
        assert torch.equal(read, choice.selection.counts + draws)
    assert errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("impl", [Impl.NUMBA, Impl.TRITON])
@pytest.mark.parametrize("draws", [1, 100, 3000])
def test_all_backends_draw_the_same(impl, draws):
    cache, rows, query = of_two_kinds()
    policy = Dynamic(coverage=0.3, min_keys=0, max_keys=150, draws=draws)  # exact scores
    one, two = (
        dynamic.select(query, cache, rows, policy, SCALE, impl=one).rest
        for one in (Impl.TORCH, impl)
    )
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def test_many_draws_are_the_exact_difference():
    """With far more draws than keys every key is drawn as often as its share says."""
    cache, rows, _ = of_two_kinds(pages=3)
    generator = torch.Generator().manual_seed(1)
    share = torch.randn(1, 1, 2, 3 * PAGE, generator=generator).softmax(-1)
    share[:, :, 1] = 0  # a head that leaves nothing out
    found = correction(share, torch.zeros(1, dtype=torch.int64), cache, rows, 4000)
    values = cache.kv[0, :, :, 1]
    off = (values - cache.value_mean[0][:, None]).flatten(0, 1)  # [keys, head_dim]
    torch.testing.assert_close(found[0], share[0, 0] @ off, atol=2e-2, rtol=0)


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA, Impl.TRITON])
def test_nothing_is_drawn_where_nothing_is_left_out(impl):
    cache, rows, query = of_two_kinds(pages=2)
    policy = Dynamic(coverage=1.0, min_keys=128, max_keys=128, draws=64)
    choice = dynamic.select(query, cache, rows, policy, SCALE, impl=impl)
    assert choice.read(rows.visible).tolist() == [[128]]
    assert not choice.rest.any()


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA, Impl.TRITON])
@pytest.mark.parametrize("whole", [0, 16_384])
def test_what_is_selected_is_never_drawn(paged, impl, whole):
    """A sink of great mass and value, in rows that select different numbers of keys."""
    case = paged([1500, 1000, 700], 2, 32, torch.float32, queries=2)
    for table in case.tables:
        case.cache.kv[:, table[0], 0] = torch.tensor([4.0, 50.0])[:, None]
        case.cache.code(torch.tensor(table[:1]))
    query = case.query(2).abs()
    means = []
    for draws in (0, 64):
        policy = Dynamic(coverage=0.9, min_keys=0, max_keys=150, whole=whole, draws=draws)
        means.append(dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl).rest)
    assert means[1].abs().max() < 4  # a normal value's size; the sink's is 50
    assert (means[1] - means[0]).abs().max() < 3


@pytest.mark.parametrize("queries", [1, 3])
def test_triton_selects_under_windows_far_apart(paged, queries):
    case = paged([300, 6000], 1, 32, torch.float32, queries=queries)
    rows = case.rows.within(256)
    query = case.query(2)
    policy = Dynamic(coverage=0.8, min_keys=0, max_keys=150, draws=32)
    one, two = (
        dynamic.select(query, case.cache, rows, policy, SCALE, impl=impl)
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    assert torch.equal(one.selection.counts, two.selection.counts)
    torch.testing.assert_close(one.log_rest, two.log_rest, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one.rest, two.rest, atol=2e-2, rtol=2e-2)
