"""Numba's selection and attention against torch's."""

from __future__ import annotations

import pytest
import torch

from kernels import dynamic, judge
from kernels.attention import Impl, selected_attention
from kernels.budget import SAMPLE
from kernels.codes import rotation
from kernels.page import PAGE
from kernels.patterns import Pattern
from kernels.policy import Dynamic
from kernels.selection import Selection
from kernels.timing import Phases

SCALE = 0.25
SHAPES = [(1, 1, 32), (2, 2, 64), (1, 3, 96), (2, 4, 128), (1, 8, 16), (1, 20, 24), (1, 5, 136)]
"""KV heads, group, head dimension."""
POLICIES = {
    "mass": Dynamic(coverage=0.8, min_keys=0, max_keys=1500, worth=0.3),
    "most keys": Dynamic(coverage=0.999, min_keys=0, max_keys=600, worth=0.0),
    "plain top-k": Dynamic(coverage=1.0, min_keys=170, max_keys=170, sampled=False),
    "mass, the greatest": Dynamic(coverage=0.8, min_keys=100, max_keys=300, sampled=False),
    "fixed number": Dynamic(coverage=1.0, min_keys=500, max_keys=500),
    "no sinks": Dynamic(coverage=0.9, min_keys=150, max_keys=700, sinks=0),
    "all keys": Dynamic(coverage=1.0, min_keys=3000, max_keys=3000),
    "the fewest of a sample": Dynamic(coverage=0.001, min_keys=0, max_keys=1),
    "those always read": Dynamic(coverage=0.001, min_keys=0, max_keys=1, sampled=False),
}
DTYPES = [torch.float32, torch.bfloat16]
SAMPLED = pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "the greatest"])


def on_grid(case, group, step=0.35):
    """Queries that the scan need not round: rotated, they stand on its sixteen levels."""
    count, head_dim = case.rows.lengths.shape[0], case.head_dim
    levels = torch.randint(
        0, 16, (count, case.kv_heads * group, head_dim), generator=case.generator
    )
    levels[..., 0] = 15  # the step is that of the greatest
    turned = (levels - 7.5) * step * 4 / head_dim**0.5
    return (turned @ rotation(head_dim, torch.float32, turned.device).T).to(case.dtype)


def both(query, case, policy):
    return [
        dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
        for impl in (Impl.NUMBA, Impl.TORCH)
    ]


def weights_of(selection, row, head):
    """What each key of a row stands for, by its position."""
    count = int(selection.counts[row, head])
    keys = selection.indices[row, head, :count].tolist()
    if selection.log_weight is None:
        return dict.fromkeys(keys, 0.0)
    return dict(zip(keys, selection.log_weight[row, head, :count].tolist(), strict=True))


def assert_alike(actual, expected, spare=1, tolerance=2e-3):
    """The same keys but for a few a row, where a sum rounds to the other side of a target.

    One key more or less moves the threshold, and what all the others stand for with it.
    """
    assert (actual.log_weight is None) == (expected.log_weight is None)
    for row in range(expected.counts.shape[0]):
        for head in range(expected.counts.shape[1]):
            one, two = (weights_of(x, row, head) for x in (actual, expected))
            differ = one.keys() ^ two.keys()
            assert len(differ) <= spare, sorted(differ)
            bound = tolerance if len(one) == len(two) else 0.1
            assert all(abs(one[key] - two[key]) <= bound for key in one.keys() & two.keys())


def assert_misses_alike(actual, expected, tolerance=5e-3):
    torch.testing.assert_close(actual.unit, expected.unit, atol=tolerance, rtol=1e-3)
    torch.testing.assert_close(actual.missing, expected.missing, atol=tolerance, rtol=1e-3)


def attended(case, query, choice, impl=Impl.TORCH):
    return selected_attention(query, case.cache, case.rows, choice.selection, SCALE, impl)


def with_starts(case, starts):
    case.rows = type(case.rows)(case.rows.block_tables, case.rows.lengths, starts)
    return case


def test_the_budgets_here_are_between_their_bounds(paged):
    """Else what follows would compare bounds."""
    case = paged([2500, 2500, 2500], 2, 64)
    choice = both(on_grid(case, 2), case, POLICIES["mass"])[0]
    counts = choice.selection.counts.unique().tolist()
    assert len(counts) > 3 and counts[0] > SAMPLE + 16 + 127 and counts[-1] < 1500


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
def test_numba_selects_what_torch_does(paged, name, kv_heads, group, head_dim):
    case = paged([40, 128, 700, 2500], kv_heads, head_dim, seed=group)
    query = on_grid(case, group)
    actual, expected = both(query, case, POLICIES[name])
    actual.selection.validate(case.rows.lengths)
    assert_alike(actual.selection, expected.selection, spare=2)
    assert_misses_alike(actual, expected)
    some, other = (attended(case, query, choice) for choice in (actual, expected))
    for one, two in zip(some, other, strict=True):
        torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-2)
    shown = actual.coverage(*some[1:]), expected.coverage(*other[1:])
    torch.testing.assert_close(*shown, atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mass", "fixed number", "plain top-k"])
@pytest.mark.parametrize("windows", [False, True])
def test_rows_of_a_sequence_and_windows(paged, dtype, name, windows):
    case = paged([200, 700, 1400], 2, 32, dtype, queries=5)
    if windows:
        starts = [0, 0, 0, 1, 2, 300, 301, 302, 319, 320, 500, 500, 900, 1330, 1399]
        with_starts(case, torch.tensor(starts))
    query = on_grid(case, 2)
    actual, expected = both(query, case, POLICIES[name])
    indices = actual.selection.indices
    assert bool(((indices >= case.rows.starts[:, None, None]) | (indices == -1)).all())
    actual.selection.validate(case.rows.lengths)
    if dtype is torch.float32:
        assert_alike(actual.selection, expected.selection)
    tolerance = 5e-3 if dtype is torch.float32 else 6e-2
    assert_misses_alike(actual, expected, tolerance)
    some, other = (attended(case, query, choice) for choice in (actual, expected))
    for one, two in zip(some[1:], other[1:], strict=True):
        torch.testing.assert_close(one, two, atol=2 * tolerance, rtol=1e-2)


@SAMPLED
def test_the_mass_found_in_bfloat16_is_that_found_in_torch(paged, sampled):
    case = paged([6000], 2, 64, torch.bfloat16, queries=8)
    query = case.query(4) * 0.7
    policy = Dynamic(coverage=1.0, min_keys=300, max_keys=300, sampled=sampled)
    found = [attended(case, query, choice) for choice in both(query, case, policy)]
    for part in (1, 2):
        mass = [one[part].exp().mean() for one in found]
        # What keys stand for depends on every key's rounding.
        torch.testing.assert_close(*mass, rtol=0.03 if sampled else 0.01, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_attention_is_torchs(paged, dtype, kv_heads, group, head_dim, weighted):
    case = paged([1, 100, 700, 900], kv_heads, head_dim, dtype)
    query = case.query(group)
    capacity = 150
    indices = torch.full((4, kv_heads, capacity), -1)
    counts = torch.zeros(4, kv_heads, dtype=torch.int64)
    for row, (length, count) in enumerate(zip([1, 100, 700, 900], [1, 37, 150, 0], strict=True)):
        for head in range(kv_heads):
            keys = torch.randperm(length, generator=case.generator)[:count].sort().values
            indices[row, head, :count], counts[row, head] = keys, count
    weights = (torch.rand(indices.shape, generator=case.generator) * 7 - 2).clamp_min(0)
    weights = weights * (indices >= 0)
    selection = Selection(indices, counts, weights if weighted else None)
    actual, expected, exact = (
        selected_attention(query, case.cache, case.rows, selection, SCALE, impl)
        for impl in (Impl.NUMBA, Impl.TORCH, Impl.REFERENCE)
    )
    for one, two, three in zip(actual, expected, exact, strict=True):
        assert one.dtype is two.dtype
        bound = 2 * float((two - three).abs().nan_to_num(0).max()) + 1e-5  # of -inf and -inf
        assert float((one - three).abs().nan_to_num(0).max()) <= bound
        assert torch.equal(one.isinf(), three.isinf())
    assert weighted or torch.equal(actual[1], actual[2])


@pytest.mark.parametrize("sinks", [0, 16])
def test_ties_go_to_the_lowest_index(paged, sinks):
    """Equal keys have equal estimates: of a flat row the first are chosen."""
    case = paged([900], 1, 32)
    case.cache.kv[:, :, :, 0] = 0.5
    case.cache.code(torch.tensor(case.tables[0][:14]))
    policy = Dynamic(coverage=1.0, min_keys=150, max_keys=150, sinks=sinks, sampled=False)
    choice = both(case.query(2), case, policy)[0]
    window = 900 - (900 // PAGE - 1) * PAGE
    expected = [*range(150 - window), *range(900 - window, 900)]
    assert choice.selection.indices[0, 0].tolist()[:150] == expected


@pytest.mark.parametrize("spare", [-1, 0, 1, 2])
@SAMPLED
def test_a_budget_of_about_all_keys(paged, spare, sampled):
    """The threshold is the last key's, or 0 where all keys are read."""
    case = paged([450], 2, 32)
    query = on_grid(case, 2)
    policy = Dynamic(coverage=1.0, min_keys=450 - spare, max_keys=450 - spare, sampled=sampled)
    actual, expected = both(query, case, policy)
    assert int(actual.selection.counts.max()) == 450 - max(spare, 0)
    assert_alike(actual.selection, expected.selection, spare=0)
    assert_misses_alike(actual, expected)
    if sampled:
        assert bool((actual.selection.log_weight > 0).any()) == (spare > 0)


@SAMPLED
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_chosen_alike_alone_in_company_and_whatever_the_threads(paged, sampled, dtype):
    case = paged([900, 3000, 70], 2, 48, dtype, queries=3)
    policy = Dynamic(coverage=0.9, min_keys=150, max_keys=300, sampled=sampled)
    query, threads = case.query(2), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for phases in (Phases(), Phases(on=True)):
                choice = dynamic.select(
                    query, case.cache, case.rows, policy, SCALE, phases, Impl.NUMBA
                )
                found.append((choice, *attended(case, query, choice, Impl.NUMBA)))
    finally:
        torch.set_num_threads(threads)
    together = found[0][0]
    # Kernels that are compiled apart round apart, in the last bits.
    near = {"atol": 1e-5, "rtol": 1e-4}
    for choice, *others in found[1:]:
        assert torch.equal(choice.selection.indices, together.selection.indices)
        torch.testing.assert_close(choice.missing, together.missing, **near)
        torch.testing.assert_close(choice.unit, together.unit, **near)
        if sampled:
            weights = (one.selection.log_weight for one in (choice, together))
            torch.testing.assert_close(*weights, **near)
        for one, two in zip(others, found[0][1:], strict=True):
            torch.testing.assert_close(one, two, **(near if dtype is torch.float32 else {}))
    for row in range(9):
        rows = case.rows.only(torch.tensor([row]))
        own = query[row : row + 1]
        alone = dynamic.select(own, case.cache, rows, policy, SCALE, impl=Impl.NUMBA)
        width = alone.selection.indices.shape[2]
        assert torch.equal(alone.selection.indices[0], together.selection.indices[row, :, :width])
        torch.testing.assert_close(alone.missing[0], together.missing[row], **near)
        torch.testing.assert_close(alone.unit[0], together.unit[row], **near)
        if sampled:
            weights = together.selection.log_weight[row, :, :width]
            torch.testing.assert_close(alone.selection.log_weight[0], weights, **near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_judges_agree(paged, dtype):
    case = paged([40, 128, 700, 2500], 2, 64, dtype, queries=2)
    query = on_grid(case, 2)
    pattern = Pattern.parse("sinks:16+window:100")
    selection = pattern.select(case.rows.lengths, case.rows.starts, 2)
    _, lse, own = selected_attention(query, case.cache, case.rows, selection, SCALE)
    estimated = [
        judge.rest_of(query, case.cache, case.rows, selection, SCALE, impl).coverage(lse, own)
        for impl in (Impl.NUMBA, Impl.TORCH)
    ]
    tolerance = 2e-3 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(*estimated, atol=tolerance, rtol=tolerance)


@SAMPLED
@pytest.mark.parametrize("where", ["key", "near key", "query"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("coverage", [0.9, 1.0])
def test_scores_that_are_not_finite_show_in_their_row_alone(paged, sampled, where, value, coverage):
    case = paged([700, 650], 1, 32, queries=2)
    query = case.query(2)
    if where == "query":
        query[:2, 1, 3] = value
    else:
        page = case.tables[0][3 if where == "key" else 10]
        case.cache.kv[0, page, 5, 0] = value
        case.cache.code(torch.tensor([page]))
    for most in (150, 690, 2000):
        policy = Dynamic(coverage=coverage, min_keys=0, max_keys=most, sampled=sampled)
        choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=Impl.NUMBA)
        choice.selection.validate(case.rows.lengths)
        shown = choice.coverage(*attended(case, query, choice, Impl.NUMBA)[1:])
        assert bool(shown[:2].isnan().any(-1).all())
        assert bool(shown[2:].isfinite().all())
    selection = Pattern.parse("sinks:16+window:300").select(case.rows.lengths, case.rows.starts, 1)
    judged = judge.rest_of(query, case.cache, case.rows, selection, SCALE, Impl.NUMBA)
    shown = judged.coverage(*attended(case, query, judged, Impl.NUMBA)[1:])
    assert bool(shown[:2].isnan().any(-1).all())
    assert bool(shown[2:].isfinite().all())


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 192, 1087, 1088, 1152, 1153])
def test_short_rows_and_the_edges_of_pages_and_blocks(paged, length):
    case = paged([length], 1, 16)
    query = on_grid(case, 3)
    for policy in POLICIES.values():
        actual, expected = both(query, case, policy)
        actual.selection.validate(case.rows.lengths)
        assert_alike(actual.selection, expected.selection)
        assert_misses_alike(actual, expected)
