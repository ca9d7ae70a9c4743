"""The remainder: what was not selected, through its pages' means."""

from __future__ import annotations

import pytest
import torch

from kernels import dynamic, reference
from kernels.attention import Impl, selected_attention
from kernels.page import PAGE
from kernels.policy import Dynamic
from kernels.remainder import mean_value
from kernels.selection import Selection

SCALE = 0.25


def dense(case, query):
    """Attention over all keys of each row's sequence: [rows, heads, head_dim], float64."""
    group = query.shape[1] // case.kv_heads
    outputs = []
    for row in range(query.shape[0]):
        n = int(case.rows.lengths[row])
        keys, values = (
            x[row // case.rows.queries][:n].transpose(0, 1).repeat_interleave(group, 0)[None]
            for x in (case.keys, case.values)
        )
        mask = torch.ones(1, query.shape[1], n, dtype=torch.bool)
        outputs.append(reference.masked_attention(query[row, None], keys, values, mask, SCALE)[0])
    return torch.cat(outputs)


def answer(case, query, impl=Impl.TORCH, **budget):
    policy = Dynamic(draws=0, **budget)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
    output, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
    return choice.complete(output, choice.coverage(lse)).double()


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
@pytest.mark.parametrize("whole", [0, 16_384], ids=["two levels", "every key scored"])
@pytest.mark.parametrize("lengths", [[4096], [2000, 4096, 130]])
def test_spread_attention_comes_near_to_dense(paged, impl, whole, lengths):
    case = paged(lengths, 2, 32, queries=2)
    query = case.query(2) / 4
    expected = dense(case, query)
    budget = {"min_keys": 0, "max_keys": 200, "rescored": 1, "whole": whole}
    near = (answer(case, query, impl, **budget) - expected).norm()
    far = (answer(case, query, impl, remainder=False, **budget) - expected).norm()
    assert near < far / 3


def test_masses_that_are_level_within_pages_lose_nothing(paged):
    case = paged([PAGE * 7 + 5], 2, 16, torch.float64)
    query = case.query(3)
    for page in case.tables[0][:7]:  # all keys of a page alike
        case.cache.kv[:, page, :, 0] = case.cache.kv[:, page, :1, 0]
    case.cache.code(torch.tensor(case.tables[0][:7]))
    flat = case.cache.kv[:, case.tables[0]].flatten(1, 2)[:, : PAGE * 7 + 5]
    case.keys[0] = flat[:, :, 0].transpose(0, 1)
    budget = {"coverage": 0.01, "min_keys": 0, "max_keys": 1, "sinks": 0, "whole": 10_000}
    torch.testing.assert_close(answer(case, query, **budget), dense(case, query))


def test_selected_keys_carry_no_weight_in_it(paged):
    case = paged([PAGE * 6], 1, 8, torch.float64)
    mass = torch.zeros(1, 1, 2, PAGE * 5, dtype=torch.float64)
    mass[..., 5] = 3.0  # selected
    mass[..., PAGE + 9] = 1.0
    mass[:, :, 1, PAGE * 2] = 3.0
    selection = Selection(torch.tensor([[[5, PAGE * 3 + 1]]]), torch.tensor([[2]]))
    page_mass = mass.view(1, 1, 2, -1, PAGE).sum(-1)
    found = mean_value(mass, page_mass, torch.tensor([0]), case.cache, case.rows, selection)
    pages = case.cache.value_mean[0, case.tables[0]]
    torch.testing.assert_close(found[0, 0], pages[1])
    torch.testing.assert_close(found[0, 1], pages[1] / 4 + pages[2] * 3 / 4)


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
@pytest.mark.parametrize("whole", [0, 16_384], ids=["two levels", "every key scored"])
def test_means_that_are_not_written_yet_do_not_matter(paged, impl, whole):
    case = paged([2000, 300], 2, 16, queries=3)
    query = case.query(2)
    policy = {"max_keys": 150, "min_keys": 0, "rescored": 1, "whole": whole}
    expected = answer(case, query, impl, **policy)
    for table, n in zip(case.tables, (2000, 300), strict=True):
        case.cache.value_mean[:, table[n // PAGE - 1 :]] = 1e30
    assert torch.equal(answer(case, query, impl, **policy), expected)


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
def test_values_of_others_that_are_not_finite_stay_theirs(paged, impl):
    case = paged([3000, 200], 1, 16)
    query = case.query(2)
    expected = answer(case, query, impl, max_keys=150, min_keys=0, whole=0)
    pages = torch.tensor(case.tables[0])
    case.cache.kv[:, pages[:40], :, 1] = torch.inf
    case.cache.code(pages[:40])
    case.rows.block_tables[1, 4:] = pages[0]  # padded with a page of the other's
    found = answer(case, query, impl, max_keys=150, min_keys=0, whole=0)
    torch.testing.assert_close(found[1], expected[1])
