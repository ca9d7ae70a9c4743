"""Triton's selection against torch's: the same estimates, budget and sample."""

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
    "mass": Dynamic(coverage=0.8, min_keys=0, max_keys=800, worth=0.2),
    "most keys": Dynamic(coverage=0.999, min_keys=0, max_keys=600, worth=0.0),
    "worth": Dynamic(coverage=0.999, min_keys=130, max_keys=1000, worth=0.4),
    "fewest": Dynamic(coverage=0.5, min_keys=0, max_keys=20),
    "plain top-k": Dynamic(coverage=1.0, min_keys=170, max_keys=170, sampled=False),
    "plain top-p": Dynamic(coverage=0.7, min_keys=100, max_keys=500, worth=0.0, sampled=False),
    "a fixed number": Dynamic(min_keys=500, max_keys=500),
    "all keys": Dynamic(coverage=1.0, min_keys=2000, max_keys=2000),
}


def sharpened(case, gain):
    """Keys that a few queries find sharply, so that there is something to select."""
    return case.query(case.group) * gain


def weights_by_key(selection, row, head):
    """Log-weight of each selected key."""
    keys = selection.indices[row, head].tolist()
    if selection.log_weight is None:
        return dict.fromkeys(keys, 0.0)
    return dict(zip(keys, selection.log_weight[row, head].tolist(), strict=True))


def assert_alike(actual, expected):
    """The same keys but for at most two, where a sum rounds to the other side of a target."""
    assert (actual.log_weight is None) == (expected.log_weight is None)
    for row in range(expected.counts.shape[0]):
        for head in range(expected.counts.shape[1]):
            one, two = (weights_by_key(x, row, head) for x in (actual, expected))
            other = (one.keys() ^ two.keys()) - {-1}
            assert len(other) <= 2, sorted(other)
            # One key more has the next priority as its threshold.
            tolerance = 0.1 if other else 1e-4
            for key in one.keys() & two.keys():
                assert abs(one[key] - two[key]) < tolerance, key


def assert_same_estimates(actual, expected):
    torch.testing.assert_close(actual.missing, expected.missing, atol=2e-3, rtol=0)
    torch.testing.assert_close(actual.unit, expected.unit, atol=1e-4, rtol=1e-5)


def assert_same_attention(case, query, *choices):
    outputs = [
        selected_attention(query, case.cache, case.rows, choice.selection, SCALE, impl)
        for choice, impl in zip(choices, (Impl.TRITON, Impl.TORCH), strict=True)
    ]
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


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
    assert_same_estimates(actual, expected)
    assert_same_attention(case, query, actual, expected)


@pytest.mark.parametrize("name", ["mass", "plain top-p", "a fixed number"])
def test_rows_of_a_sequence_and_windows(make, name):
    starts = torch.tensor([0, 0, 0, 5, 301, 302, 500, 500, 950])
    case = make(2, 2, 32, lengths=(200, 700, 1000), queries=3, starts=starts)
    query, policy = sharpened(case, 1.5), POLICIES[name]
    expected, actual = (
        dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    actual.selection.validate(case.rows.lengths)
    assert_alike(actual.selection, expected.selection)
    assert bool(
        (
            (actual.selection.indices >= starts[:, None, None]) | (actual.selection.indices == -1)
        ).all()
    )
    assert_same_estimates(actual, expected)
    assert_same_attention(case, query, actual, expected)


def test_many_splits_agree(make, monkeypatch):
    """A context long enough for several programs a row and KV head, each of several turns."""
    monkeypatch.setattr("kernels.gpu.launch.PROGRAMS", 4)
    case = make(1, 2, 32, lengths=(4990, 700))
    query = sharpened(case, 0.7)
    for policy in (
        Dynamic(coverage=0.9, min_keys=0, max_keys=4000, worth=0.0),
        Dynamic(min_keys=1500, max_keys=1500),
    ):
        expected, actual = (
            dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
            for impl in (Impl.TORCH, Impl.TRITON)
        )
        actual.selection.validate(case.rows.lengths)
        assert_alike(actual.selection, expected.selection)
        assert_same_estimates(actual, expected)
        assert_same_attention(case, query, actual, expected)


@pytest.mark.parametrize("lengths", [(1, 5), (40, 64, 127), (63, 128, 129)])
@pytest.mark.parametrize("name", ["mass", "a fixed number", "plain top-k"])
def test_rows_shorter_than_the_recent_window_are_read_whole(make, lengths, name):
    case = make(1, 2, 32, lengths=lengths)
    query = sharpened(case, 1.0)
    choice = dynamic.select(query, case.cache, case.rows, POLICIES[name], SCALE, impl=Impl.TRITON)
    choice.selection.validate(case.rows.lengths)
    for row, length in enumerate(lengths):
        if length < 128:
            assert choice.selection.indices[row, 0, :length].tolist() == list(range(length))
            assert int(choice.selection.counts[row, 0]) == length
            assert bool((choice.missing[row] == 0).all())


def equal_keys(make):
    case = make(1, 2, 32, lengths=(900,))
    case.cache.kv[:, :, :, 0] = 0.5
    case.cache.code(torch.tensor(case.tables[0][:14]))
    return case


def test_ties_go_to_the_lowest_index(make):
    """Equal keys have equal estimates: of a flat row the first are taken."""
    case = equal_keys(make)
    query = sharpened(case, 1.0)
    policy = Dynamic(coverage=1.0, min_keys=150, max_keys=150, sinks=0, sampled=False)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=Impl.TRITON)
    window = 900 - (900 // PAGE - 1) * PAGE
    expected = [*range(150 - window), *range(900 - window, 900)]
    assert choice.selection.indices[0, 0].tolist()[:150] == expected
    _, lse, own = selected_attention(
        query, case.cache, case.rows, choice.selection, SCALE, Impl.TRITON
    )
    torch.testing.assert_close(choice.coverage(lse, own), torch.full_like(own, 1 / 6))


def test_the_sample_of_equal_keys_is_even(make):
    case = equal_keys(make)
    query = sharpened(case, 1.0)
    policy = Dynamic(coverage=1.0, min_keys=450, max_keys=450)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=Impl.TRITON)
    _, lse, own = selected_attention(
        query, case.cache, case.rows, choice.selection, SCALE, Impl.TRITON
    )
    torch.testing.assert_close((lse - own).exp(), torch.full_like(lse, 2.0), atol=0.05, rtol=0)
    torch.testing.assert_close(choice.coverage(lse, own), torch.full_like(own, 1 / 2))


@pytest.mark.parametrize("coverage", [0.3017, 0.9013, 0.97])
@pytest.mark.parametrize("worth", [0.0, 0.7])
def test_the_budget_is_torchs_budget(make, coverage, worth):
    case = make(2, 2, 32, lengths=(700, 1000, 333))
    query, policy = sharpened(case, 1.0), Dynamic(coverage, 0, 700, worth)
    expected, actual = (
        dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl).selection.counts
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    assert int((actual - expected).abs().max()) <= 1


@pytest.mark.parametrize("queries", [1, 3])
def test_windows_far_apart(paged, queries):
    """The scores of a piece span the keys of all its rows: sequences are then taken one by one."""
    case = paged([300, 6000], 1, 32, torch.float32, queries=queries)
    rows, query = case.rows.within(600), case.query(2)
    one, two = (
        dynamic.select(query, case.cache, rows, POLICIES["mass"], SCALE, impl=impl)
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    assert torch.equal(one.selection.counts, two.selection.counts)
    for field in ("missing", "unit"):
        expected, actual = (getattr(choice, field) for choice in (one, two))
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


def test_judges_agree(make):
    case = make(2, 2, 32)
    query = sharpened(case, 1.5)
    pattern = Pattern.parse("sinks:16+window:100")
    selection = pattern.select(case.rows.lengths, case.rows.starts, 2)
    _, lse, own = selected_attention(query, case.cache, case.rows, selection, SCALE)
    estimated, exact = [], []
    for impl in (Impl.TORCH, Impl.TRITON):
        choice = judge.rest_of(query, case.cache, case.rows, selection, SCALE, impl)
        estimated.append(choice.coverage(lse, own))
        exact.append(judge.true_coverage(query, case.cache, case.rows, selection, own, SCALE, impl))
    torch.testing.assert_close(*estimated, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(*exact, atol=1e-5, rtol=1e-4)


def test_a_judged_row_may_be_short(make):
    case = make(1, 2, 32, lengths=(5, 100))
    query = sharpened(case, 1.0)
    selection = Pattern.parse("window:3").select(case.rows.lengths, case.rows.starts, 1)
    one, two = (
        judge.rest_of(query, case.cache, case.rows, selection, SCALE, impl).unit
        for impl in (Impl.TORCH, Impl.TRITON)
    )
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mass", "plain top-k", "a fixed number"])
def test_scores_that_are_not_finite_show(make, name):
    case = make(1, 2, 32, lengths=(700, 650))
    case.cache.kv[0, case.tables[0][3], 5, 0] = torch.inf
    case.cache.code(torch.tensor([case.tables[0][3]]))
    query = sharpened(case, 1.0)
    choice = dynamic.select(query, case.cache, case.rows, POLICIES[name], SCALE, impl=Impl.TRITON)
    choice.selection.validate(case.rows.lengths)
    _, lse, own = selected_attention(
        query, case.cache, case.rows, choice.selection, SCALE, Impl.TRITON
    )
    coverage = choice.coverage(lse, own)
    assert bool(coverage[0].isnan().any())
    assert bool(coverage[1].isfinite().all())
