"""Triton's selection against torch's: the same estimates, candidates, budget and remainder."""

from __future__ import annotations

import pytest
import torch

from kernels import dynamic, judge
from kernels.attention import Impl, selected_attention
from kernels.page import PAGE
from kernels.patterns import Pattern
from kernels.policy import Dynamic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.25
SHAPES = [(1, 1, 32), (2, 2, 64), (1, 3, 96), (1, 8, 16), (1, 20, 32)]
"""KV heads, group, head dimension."""
POLICIES = {
    "mass": Dynamic(coverage=0.8, min_keys=0, max_keys=160, whole=0),
    "most keys": Dynamic(coverage=0.999, min_keys=0, max_keys=150, whole=0, worth=0.0),
    "plain top-k": Dynamic(coverage=1.0, min_keys=170, max_keys=170, whole=0, remainder=False),
    "every key scored": Dynamic(coverage=0.9, min_keys=150, max_keys=300),
    "all keys": Dynamic(coverage=1.0, min_keys=2000, max_keys=2000),
}


def sharpened(case, gain):
    """Keys that a few queries find sharply, so that there is something to select."""
    return case.query(case.group) * gain


def assert_alike(actual, expected):
    """The same keys but for at most one a row, where a sum rounds to the other side of a target."""
    for row in range(expected.counts.shape[0]):
        for head in range(expected.counts.shape[1]):
            one, two = (set(x.indices[row, head].tolist()) - {-1} for x in (actual, expected))
            assert len(one ^ two) <= 1, sorted(one ^ two)


def assert_same_attention(case, query, *choices):
    """The remainder counts where something is left out, and nowhere else."""
    outputs = []
    for choice in choices:
        output, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
        outputs.append(choice.complete(output, choice.coverage(lse)))
    torch.testing.assert_close(*outputs, atol=1e-2, rtol=1e-2)


@pytest.fixture
def make(paged):
    def build(kv_heads, group, head_dim, lengths=(40, 128, 700, 1000), queries=1, starts=None):
        case = paged(list(lengths), kv_heads, head_dim, torch.float32, seed=group, queries=queries)
        case.group = group
        if starts is not None:
            case.rows = type(case.rows)(case.rows.block_tables, case.rows.lengths, starts)
        return case

    return build


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
def test_triton_selects_what_torch_does(make, name, kv_heads, group, head_dim):
    case, policy = make(kv_heads, group, head_dim), POLICIES[name]
    query = sharpened(case, 1.5)
    expected, actual = (
        dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    actual.selection.validate(case.rows.lengths)
    assert_alike(actual.selection, expected.selection)
    torch.testing.assert_close(actual.log_rest, expected.log_rest, atol=5e-3, rtol=1e-3)
    assert (actual.rest is None) == (expected.rest is None)
    assert_same_attention(case, query, actual, expected)


@pytest.mark.parametrize("name", ["mass", "every key scored"])
def test_rows_of_a_sequence_and_windows(make, name):
    starts = torch.tensor([0, 0, 0, 300, 301, 302, 500, 500, 900])
    case = make(2, 2, 32, lengths=(200, 700, 1000), queries=3, starts=starts)
    query, policy = sharpened(case, 1.5), POLICIES[name]
    expected, actual = (
        dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    assert_alike(actual.selection, expected.selection)
    assert bool(
        (
            (actual.selection.indices >= starts[:, None, None]) | (actual.selection.indices == -1)
        ).all()
    )
    torch.testing.assert_close(actual.log_rest, expected.log_rest, atol=5e-3, rtol=1e-3)
    assert_same_attention(case, query, actual, expected)


def test_ties_go_to_the_lowest_index(make):
    """Equal keys have equal estimates: of a flat row the first are candidates, and chosen."""
    case = make(1, 2, 32, lengths=(900,))
    case.cache.kv[:, :, :, 0] = 0.5
    case.cache.code(torch.tensor(case.tables[0][:14]))
    policy = Dynamic(coverage=1.0, min_keys=150, max_keys=150, sinks=0, whole=0)
    choice = dynamic.select(
        sharpened(case, 1.0), case.cache, case.rows, policy, SCALE, impl=Impl.TRITON
    )
    window = 900 - (900 // PAGE - 1) * PAGE
    expected = [*range(150 - window), *range(900 - window, 900)]
    assert choice.selection.indices[0, 0].tolist()[:150] == expected


def test_judges_agree(make):
    case = make(2, 2, 32)
    query = sharpened(case, 1.5)
    pattern = Pattern.parse("sinks:16+window:100")
    selection = pattern.select(case.rows.lengths, case.rows.starts, 2)
    _, lse = selected_attention(query, case.cache, case.rows, selection, SCALE)
    estimated, exact = [], []
    for impl in (Impl.TORCH, Impl.TRITON):
        choice = judge.rest_of(query, case.cache, case.rows, selection, SCALE, impl)
        estimated.append(choice.coverage(lse))
        exact.append(judge.true_coverage(query, case.cache, case.rows, selection, lse, SCALE, impl))
    torch.testing.assert_close(*estimated, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(*exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [0, 16_384])
def test_scores_that_are_not_finite_show(make, whole):
    case = make(1, 2, 32, lengths=(700, 650))
    case.cache.kv[0, case.tables[0][3], 5, 0] = torch.inf
    case.cache.code(torch.tensor([case.tables[0][3]]))
    policy = Dynamic(coverage=0.9, min_keys=0, max_keys=150, whole=whole)
    choice = dynamic.select(
        sharpened(case, 1.0), case.cache, case.rows, policy, SCALE, impl=Impl.TRITON
    )
    _, lse = selected_attention(
        sharpened(case, 1.0), case.cache, case.rows, choice.selection, SCALE, Impl.TRITON
    )
    coverage = choice.coverage(lse)
    assert bool(coverage[0].isnan().any())
    assert bool(coverage[1].isfinite().all())
