"""Numba's selection and attention against torch's."""

from __future__ import annotations

import pytest
import torch

from kernels import dynamic, judge
from kernels.attention import Impl, selected_attention
from kernels.codes import rotation
from kernels.page import PAGE
from kernels.patterns import Pattern
from kernels.policy import Dynamic
from kernels.timing import Phases

SCALE = 0.25
SHAPES = [(1, 1, 32), (2, 2, 64), (1, 3, 96), (2, 4, 128), (1, 8, 16), (1, 20, 24), (1, 5, 136)]
"""KV heads, group, head dimension."""
POLICIES = {
    "mass": Dynamic(coverage=0.8, min_keys=0, max_keys=160, whole=0, draws=0),
    "most keys": Dynamic(coverage=0.999, min_keys=0, max_keys=150, whole=0, worth=0.0),
    "plain top-k": Dynamic(coverage=1.0, min_keys=170, max_keys=170, whole=0, remainder=False),
    "drawn": Dynamic(coverage=0.8, min_keys=0, max_keys=160, whole=0, draws=1000),
    "every key scored": Dynamic(coverage=0.9, min_keys=150, max_keys=300, draws=0),
    "all keys": Dynamic(coverage=1.0, min_keys=2000, max_keys=2000),
}
DTYPES = [torch.float32, torch.bfloat16]
WHOLE = pytest.mark.parametrize("whole", [0, 16_384], ids=["two levels", "every key scored"])


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


def assert_alike(actual, expected, spare=1):
    """The same keys but for a few a row, where a sum rounds to the other side of a target."""
    for row in range(expected.counts.shape[0]):
        for head in range(expected.counts.shape[1]):
            one, two = (set(x.indices[row, head].tolist()) - {-1} for x in (actual, expected))
            assert len(one ^ two) <= spare, sorted(one ^ two)


def attended(case, query, choice, impl=Impl.TORCH):
    output, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE, impl)
    return choice.complete(output, choice.coverage(lse)), lse


def with_starts(case, starts):
    case.rows = type(case.rows)(case.rows.block_tables, case.rows.lengths, starts)
    return case


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
def test_numba_selects_what_torch_does(paged, name, kv_heads, group, head_dim):
    case = paged([40, 128, 700, 2500], kv_heads, head_dim, seed=group)
    query = on_grid(case, group)
    actual, expected = both(query, case, POLICIES[name])
    actual.selection.validate(case.rows.lengths)
    assert_alike(actual.selection, expected.selection, spare=2)
    torch.testing.assert_close(actual.log_rest, expected.log_rest, atol=5e-3, rtol=1e-3)
    assert (actual.rest is None) == (expected.rest is None)
    one, two = (attended(case, query, choice)[0] for choice in (actual, expected))
    torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mass", "drawn", "every key scored"])
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
    torch.testing.assert_close(actual.log_rest, expected.log_rest, atol=tolerance, rtol=1e-3)
    one, two = (attended(case, query, choice)[0] for choice in (actual, expected))
    torch.testing.assert_close(one, two, atol=2 * tolerance, rtol=1e-2)


@WHOLE
def test_the_mass_found_in_bfloat16_is_that_found_in_torch(paged, whole):
    case = paged([6000], 2, 64, torch.bfloat16, queries=8)
    query = case.query(4) * 0.7
    policy = Dynamic(coverage=1.0, min_keys=300, max_keys=300, whole=whole)
    mass = [attended(case, query, choice)[1].exp().mean() for choice in both(query, case, policy)]
    torch.testing.assert_close(*mass, rtol=0.01, atol=0)


def test_ties_go_to_the_lowest_index(paged):
    """Equal keys have equal estimates: of a flat row the first are candidates, and chosen."""
    case = paged([900], 1, 32)
    case.cache.kv[:, :, :, 0] = 0.5
    case.cache.code(torch.tensor(case.tables[0][:14]))
    for whole in (0, 16_384):
        policy = Dynamic(coverage=1.0, min_keys=150, max_keys=150, sinks=0, whole=whole)
        choice = both(case.query(2), case, policy)[0]
        window = 900 - (900 // PAGE - 1) * PAGE
        expected = [*range(150 - window), *range(900 - window, 900)]
        assert choice.selection.indices[0, 0].tolist()[:150] == expected


@WHOLE
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_chosen_alike_alone_in_company_and_whatever_the_threads(paged, whole, dtype):
    case = paged([900, 3000, 70], 2, 48, dtype, queries=3)
    policy = Dynamic(coverage=0.9, min_keys=150, max_keys=300, whole=whole, draws=40)
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
    for choice, output, lse in found[1:]:
        assert torch.equal(choice.selection.indices, found[0][0].selection.indices)
        assert torch.equal(choice.log_rest, found[0][0].log_rest)
        assert torch.equal(choice.rest, found[0][0].rest)
        assert torch.equal(output, found[0][1])
        assert torch.equal(lse, found[0][2])
    for row in range(9):
        rows = case.rows.only(torch.tensor([row]))
        own = query[row : row + 1]
        alone = dynamic.select(own, case.cache, rows, policy, SCALE, impl=Impl.NUMBA)
        width = alone.selection.indices.shape[2]
        together = found[0][0]
        assert torch.equal(alone.selection.indices[0], together.selection.indices[row, :, :width])
        assert torch.equal(alone.log_rest[0], together.log_rest[row])
        assert torch.equal(alone.rest[0], together.rest[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_judges_agree(paged, dtype):
    case = paged([40, 128, 700, 2500], 2, 64, dtype, queries=2)
    query = on_grid(case, 2)
    pattern = Pattern.parse("sinks:16+window:100")
    selection = pattern.select(case.rows.lengths, case.rows.starts, 2)
    _, lse = selected_attention(query, case.cache, case.rows, selection, SCALE)
    estimated = [
        judge.rest_of(query, case.cache, case.rows, selection, SCALE, impl).coverage(lse)
        for impl in (Impl.NUMBA, Impl.TORCH)
    ]
    tolerance = 2e-3 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(*estimated, atol=tolerance, rtol=tolerance)


@WHOLE
@pytest.mark.parametrize("where", ["key", "query"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite_show_in_their_row_alone(paged, whole, where, value):
    case = paged([700, 650], 1, 32, queries=2)
    query = case.query(2)
    if where == "key":
        case.cache.kv[0, case.tables[0][3], 5, 0] = value
        case.cache.code(torch.tensor([case.tables[0][3]]))
    else:
        query[:2, 1, 3] = value
    policy = Dynamic(coverage=0.9, min_keys=0, max_keys=150, whole=whole)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=Impl.NUMBA)
    coverage = choice.coverage(attended(case, query, choice, Impl.NUMBA)[1])
    assert bool(coverage[:2].isnan().any(-1).all())
    assert bool(coverage[2:].isfinite().all())


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 192, 1088, 1152])
def test_short_rows_and_the_edges_of_pages_and_blocks(paged, length):
    case = paged([length], 1, 16)
    query = on_grid(case, 3)
    for policy in POLICIES.values():
        actual, expected = both(query, case, policy)
        assert_alike(actual.selection, expected.selection)
        torch.testing.assert_close(actual.log_rest, expected.log_rest, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_of_a_sequence_are_chosen_as_each_alone(paged, dtype):
    """From four rows on one product scores their keys; it rounds no more than a row's own."""
    case = paged([3000], 2, 48, dtype, queries=5)
    policy, query = Dynamic(coverage=0.9, min_keys=150, max_keys=300), case.query(2)
    together = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=Impl.NUMBA)
    for row in range(5):
        one = case.rows.only(torch.tensor([row]))
        alone = dynamic.select(
            query[row : row + 1], case.cache, one, policy, SCALE, impl=Impl.NUMBA
        )
        for head in range(2):
            some = together.selection.indices[row, head].tolist()
            other = alone.selection.indices[0, head].tolist()
            assert len(set(some) ^ set(other)) <= 2
        torch.testing.assert_close(alone.log_rest[0], together.log_rest[row], atol=1e-3, rtol=1e-4)
