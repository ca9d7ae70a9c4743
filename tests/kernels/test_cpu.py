"""Numba's selection and attention against torch's."""

from __future__ import annotations

import math
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from kernels import dynamic, judge
from kernels.attention import Impl, selected_attention
from kernels.budget import FAR, SAMPLE, probed
from kernels.codes import FLOAT8, rotation
from kernels.cpu.number import number
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic
from kernels.sample import BITS
from kernels.selection import Selection
from kernels.timing import Phases

SCALE = 0.25
SHAPES = [
    (1, 1, 32), (2, 2, 64), (2, 4, 80), (1, 3, 96), (2, 4, 128), (1, 8, 16), (1, 20, 24),
    (1, 5, 136),
]  # fmt: skip
"""KV heads, group, head dimension."""
POLICIES = {
    "mass": Dynamic(coverage=0.8, min_keys=0, max_keys=2500, worth=0.3),
    "most keys": Dynamic(coverage=0.999, min_keys=0, max_keys=900, worth=0.0),
    "fixed number": Dynamic(coverage=1.0, min_keys=1000, max_keys=1000),
    "no sinks": Dynamic(coverage=0.9, min_keys=150, max_keys=1200, sinks=0),
    "a page of sinks": Dynamic(coverage=0.9, min_keys=150, max_keys=1200, sinks=64),
    "all keys": Dynamic(coverage=1.0, min_keys=4000, max_keys=10**9),
    "the fewest of a sample": Dynamic(coverage=0.001, min_keys=0, max_keys=1),
}
DTYPES = [torch.float32, torch.bfloat16]


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
    return dict(zip(keys, selection.log_weight[row, head, :count].tolist(), strict=True))


def assert_alike(actual, expected, spare=6):
    """The same keys but for a few a row, where lengths round to the other side of a mark."""
    for row in range(expected.counts.shape[0]):
        for head in range(expected.counts.shape[1]):
            one, two = (weights_of(x, row, head) for x in (actual, expected))
            assert len(one.keys() ^ two.keys()) <= spare, sorted(one.keys() ^ two.keys())
            for key in one.keys() & two.keys():
                bound = 1e-4 + 2 * math.exp(two[key]) / 2**BITS  # two units of its length
                assert abs(one[key] - two[key]) <= bound or math.isnan(one[key] + two[key])
                assert math.isnan(one[key]) == math.isnan(two[key])


def attended(case, query, selection, impl=Impl.TORCH):
    return selected_attention(query, case.cache, case.rows, selection, SCALE, impl)


def coverage_of(case, query, selection, impl):
    _, lse, own = attended(case, query, selection, impl)
    return judge.estimated_coverage(query, case.cache, case.rows, selection, lse, own, SCALE, impl)


def with_starts(case, starts):
    case.rows = type(case.rows)(case.rows.block_tables, case.rows.lengths, starts)
    return case


def in_float32(case):
    """The same case with its numbers in float32."""
    cache = case.cache
    case.cache = replace(cache, kv=cache.kv.float(), key_mean=cache.key_mean.float())
    return case


def test_numbers_of_eight_bits_are_torchs():
    @numba.njit
    def unpack(source, target):
        for place in range(len(source)):
            target[place] = number(source[place])

    every, found = torch.arange(256).to(torch.uint8), np.empty(256, np.float32)
    unpack(every.numpy(), found)
    assert np.array_equal(found, every.view(FLOAT8).float().numpy(), equal_nan=True)


def test_the_budgets_here_are_between_their_bounds(paged):
    """Else what follows would compare bounds."""
    case = paged([4000, 4000, 4000], 2, 64)
    query = on_grid(case, 2) * torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    actual, expected = both(query, case, POLICIES["mass"])
    assert_alike(actual, expected)
    counts = actual.counts
    assert int(counts.min()) < SAMPLE + 16 + 127 < 2 * SAMPLE < int(counts.max()) < 2300


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
def test_numba_selects_what_torch_does(paged, name, kv_heads, group, head_dim):
    case = paged([40, 128, 700, 4000], kv_heads, head_dim, seed=group)
    query = on_grid(case, group)
    actual, expected = both(query, case, POLICIES[name])
    actual.validate(case.rows.lengths)
    assert actual.indices.shape[2] == int(actual.counts.max())
    assert_alike(actual, expected)


@pytest.mark.parametrize("name", ["mass", "fixed number", "a page of sinks"])
@pytest.mark.parametrize("windows", [False, True])
def test_rows_of_a_sequence_and_windows(paged, name, windows):
    case = paged([200, 1700, 4400], 2, 32, queries=5)
    if windows:
        starts = [0, 0, 0, 1, 2, 300, 301, 319, 320, 1024, 0, 1000, 1060, 2500, 4399]
        with_starts(case, torch.tensor(starts))
    query = on_grid(case, 2)
    actual, expected = both(query, case, POLICIES[name])
    indices = actual.indices
    assert bool(((indices >= case.rows.starts[:, None, None]) | (indices == -1)).all())
    actual.validate(case.rows.lengths)
    assert_alike(actual, expected)


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
def test_bfloat16_is_read_as_it_is(paged, kv_heads, group, head_dim):
    case = paged([150, 4000], kv_heads, head_dim, torch.bfloat16, queries=2)
    query = case.query(group)
    actual, _ = both(query, case, POLICIES["mass"])
    actual.validate(case.rows.lengths)
    expected, _ = both(query.float(), in_float32(case), POLICIES["mass"])
    assert_alike(actual, expected)


def test_the_mass_found_in_bfloat16_is_that_found_in_torch(paged):
    case = paged([6000], 2, 64, torch.bfloat16, queries=8)
    query = case.query(4) * 0.7
    policy = Dynamic(coverage=1.0, min_keys=300, max_keys=300)
    found = [attended(case, query, selection) for selection in both(query, case, policy)]
    for part in (1, 2):
        mass = [one[part].exp().mean() for one in found]
        torch.testing.assert_close(*mass, rtol=0.03, atol=0)


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


@pytest.mark.parametrize("spare", [-1, 0, 1, 2])
def test_a_budget_of_about_all_keys(paged, spare):
    """As many marks as free keys: all are read. One less, and keys stand for others."""
    case = paged([1450], 2, 32)
    query = on_grid(case, 2)
    policy = Dynamic(coverage=1.0, min_keys=1450 - spare, max_keys=1450 - spare)
    actual, expected = both(query, case, policy)
    assert (int(actual.counts.min()) == 1450) == (spare <= 0)
    assert_alike(actual, expected)
    assert bool((actual.log_weight > 0).any()) == (spare > 0)


def unprobed(count, pages):
    """Positions that no probe meets, a few in each page but the first."""
    probes = set(probed(0, pages, torch.tensor([1]))[0].tolist())
    others = ([n for n in range(p * PAGE, (p + 1) * PAGE) if n not in probes] for p in range(pages))
    return [position for page in [*others][1:] for position in page[:count]]


@pytest.mark.parametrize("window", [None, FAR - 100, FAR, 2 * FAR])
def test_rows_of_which_not_every_page_is_probed(paged, window):
    case = paged([FAR - 1, FAR, 900, 2 * FAR + 3000], 1, 32)
    case.rows = case.rows.within(window)
    query = on_grid(case, 2)
    assert_alike(*both(query, case, Dynamic(coverage=1.0, min_keys=0, max_keys=3000)))


def test_more_keys_than_the_budget_where_probes_miss_them(paged):
    """Shares sum to more than 1 then; nothing is cut off."""
    case = paged([4096 + PAGE], 1, 64)
    query = on_grid(case, 2)
    direction = query[0].sum(0) / query[0].sum(0).norm()
    case.cache.kv[..., 0, :] *= 0.1
    for position in unprobed(30, 64):
        page = case.tables[0][position // PAGE]
        case.cache.kv[0, page, position % PAGE, 0] += 8 * direction
    case.cache.code(torch.tensor(case.tables[0]))
    policy = Dynamic(coverage=1.0, min_keys=700, max_keys=700)
    actual, expected = both(query, case, policy)
    actual.validate(case.rows.lengths)
    assert int(actual.counts.min()) > 800
    assert_alike(actual, expected, spare=6)


def test_a_score_far_above_what_the_probes_tell_is_certain(paged):
    case = paged([3000], 1, 256)
    query = on_grid(case, 1)
    position = unprobed(1, 20)[-1]
    page = case.tables[0][position // PAGE]
    own = query[0, 0] / query[0, 0].square().sum()
    case.cache.kv[0, page, position % PAGE, 0] = own * 150 / SCALE
    case.cache.code(torch.tensor([page]))
    for selection in both(query, case, POLICIES["the fewest of a sample"]):
        assert weights_of(selection, 0, 0)[position] == 0
        assert bool(selection.log_weight.isfinite().all())
        output, lse, own = attended(case, query, selection, Impl.NUMBA)
        assert bool(output.isfinite().all())
        torch.testing.assert_close(lse, own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_chosen_alike_alone_in_company_and_whatever_the_threads(paged, dtype):
    case = paged([900, 3000, 70], 2, 48, dtype, queries=3)
    policy = Dynamic(coverage=0.9, min_keys=150, max_keys=700)
    query, threads = case.query(2), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5, 7):
            torch.set_num_threads(count)
            for phases in (Phases(), Phases(on=True)):
                selection = dynamic.select(
                    query, case.cache, case.rows, policy, SCALE, phases, Impl.NUMBA
                )
                found.append((selection, *attended(case, query, selection, Impl.NUMBA)))
    finally:
        torch.set_num_threads(threads)
    together, *attention = found[0]
    for selection, *others in found[1:]:
        assert torch.equal(selection.indices, together.indices)
        assert torch.equal(selection.log_weight, together.log_weight)
        for one, two in zip(others, attention, strict=True):
            assert torch.equal(one, two)
    for row in range(9):
        rows = case.rows.only(torch.tensor([row]))
        own = query[row : row + 1]
        alone = dynamic.select(own, case.cache, rows, policy, SCALE, impl=Impl.NUMBA)
        width = alone.indices.shape[2]
        assert torch.equal(alone.indices[0], together.indices[row, :, :width])
        assert torch.equal(alone.log_weight[0], together.log_weight[row, :, :width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("windows", [False, True])
def test_judges_agree(paged, dtype, windows):
    case = paged([40, 128, 700, 2500], 2, 64, dtype, queries=2)
    if windows:
        with_starts(case, torch.tensor([0, 0, 3, 70, 500, 690, 1000, 2300]))
    query = on_grid(case, 2)
    pattern = Pattern.parse("sinks:16+window:100+strided:7")
    selection = pattern.select(case.rows.lengths, case.rows.starts, 2)
    one, two = (coverage_of(case, query, selection, impl) for impl in (Impl.NUMBA, Impl.TORCH))
    tolerance = 2e-3 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("where", ["key", "value", "near key", "query"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("coverage", [0.9, 1.0])
def test_scores_that_are_not_finite_show_in_their_row_alone(paged, where, value, coverage):
    case = paged([1700, 1650], 1, 32, queries=2)
    query = on_grid(case, 2)
    if where == "query":
        query[:2, 1, 3] = value
    else:
        page = case.tables[0][26 if where == "near key" else 3]
        case.cache.kv[0, page, 5, int(where == "value")] = value
        case.cache.code(torch.tensor([page]))
    for most in (150, 1000, 2000):
        policy = Dynamic(coverage=coverage, min_keys=0, max_keys=most)
        actual, expected = both(query, case, policy)
        actual.validate(case.rows.lengths)
        assert_alike(actual, expected)
        some, other = (
            coverage_of(case, query, selection, impl)
            for selection, impl in ((actual, Impl.NUMBA), (expected, Impl.TORCH))
        )
        assert torch.equal(some.isnan(), other.isnan())
        assert bool(some[2:].isfinite().all())
        if where in ("near key", "query"):
            assert bool(some[:2].isnan().any(-1).all())
    selection = Pattern.parse("sinks:16+window:300").select(case.rows.lengths, case.rows.starts, 1)
    shown = coverage_of(case, query, selection, Impl.NUMBA)
    assert bool(shown[:2].isnan().any(-1).all()) == (where != "value")
    assert bool(shown[2:].isfinite().all())


@pytest.mark.parametrize(
    "length",
    [1, 2, 63, 64, 65, 127, 128, 129, 192, 1087, 1088, 1151, 1152, 1153, 2111, 2112, 2175, 2176],
)
def test_short_rows_and_the_edges_of_pages_and_segments(paged, length):
    case = paged([length], 1, 16)
    query = on_grid(case, 3)
    for policy in POLICIES.values():
        actual, expected = both(query, case, policy)
        actual.validate(case.rows.lengths)
        assert_alike(actual, expected)
