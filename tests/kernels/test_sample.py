"""The sample is what its definition says, stands for all keys, and misses no part of a text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import budget, dynamic, reference_sample, sample
from kernels.attention import Impl, dense_decode
from kernels.budget import FAR, PROBE, SAMPLE
from kernels.codes import FOURS
from kernels.page import PAGE
from kernels.policy import Dynamic
from kernels.sample import BITS, SEGMENT

SCALE = 0.25
LINE = SEGMENT * PAGE
UNIT = 1 << BITS
IMPLS = pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])


def some_shares(seed, keys, sharpness, rows=3, kv_heads=2):
    """Shares of the attention mass that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, kv_heads, keys, generator=generator, dtype=torch.float64)
    return (scores * sharpness).softmax(-1)


def lengths_of(share, marks, everything=False):
    number = torch.full(share.shape[:2], marks)
    return sample.lengths(share, number, torch.full(share.shape[:2], everything))


def sums(length, hit, value):
    """Of a value of every key, as the sample estimates it: [rows, kv_heads]."""
    return (sample.log_weight(length).exp() * hit * value).sum(-1)


lengths = st.builds(
    lambda seed, pages, sharpness, marks: lengths_of(
        some_shares(seed, pages * PAGE, sharpness), marks
    ),
    st.integers(0, 10**6),
    st.integers(1, 2 * SEGMENT + 5),
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.sampled_from([1, 7, 240, 256, 1000, 9000]),
)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 5))
def test_the_sample_is_the_reference_sample(length, first):
    hit = sample.marked(length, first * SEGMENT)
    segments = -(-length.shape[-1] // LINE)
    start = sample.phases(first, segments, 2, length.device).tolist()
    for row in range(3):
        for head in range(2):
            expected = reference_sample.marked(length[row, head], start[head], SEGMENT, UNIT)
            assert hit[row, head].nonzero()[:, 0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(lengths)
def test_every_segment_has_as_many_keys_as_marks_but_for_one(length):
    hits = sample.marked(length, 0).split(LINE, -1)
    for part, hit in zip(length.split(LINE, -1), hits, strict=True):
        assert ((hit.sum(-1) * UNIT - part.sum(-1)).abs() < UNIT).all()


@settings(max_examples=60, deadline=None)
@given(lengths)
def test_keys_as_long_as_the_distance_between_marks_are_certain(length):
    hit, weight = sample.marked(length, 0), sample.log_weight(length)
    assert (hit & (weight == 0))[length == UNIT].all()
    assert (weight[length < UNIT] > 0).all()
    assert not hit[length == 0].any()


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 10), st.integers(1, 40))
def test_a_key_is_read_whoever_looks_for_it(length, before, pages):
    """Rows that begin a segment earlier, or end sooner, have the same keys."""
    hit = sample.marked(length, before * SEGMENT)
    longer = torch.nn.functional.pad(length, (before * LINE, 3 * PAGE))
    assert torch.equal(sample.marked(longer, 0)[..., before * LINE : -3 * PAGE], hit)
    shorter = length[..., : pages * PAGE]
    end = shorter.shape[-1]
    assert torch.equal(sample.marked(shorter, before * SEGMENT), hit[..., :end])
    for row in range(3):
        assert torch.equal(sample.marked(length[row : row + 1], before * SEGMENT)[0], hit[row])


def test_a_row_without_free_keys_has_an_empty_sample():
    assert sample.marked(torch.zeros(2, 3, 0, dtype=torch.int64), 0).shape == (2, 3, 0)


def test_a_share_as_great_as_the_distance_between_marks_is_a_certain_key():
    share = torch.tensor([[[0.0, 0.001, 0.01, 0.5, torch.inf, torch.nan]]])
    assert lengths_of(share, 100)[0, 0].tolist() == [0, round(UNIT / 10), *[UNIT] * 4]
    assert (lengths_of(share, 100, everything=True) == UNIT).all()


def test_sums_over_the_sample_are_right_on_average(monkeypatch):
    """Exactly, over all places of the first mark; whatever is summed, however wrong the shares."""
    bits = 6
    monkeypatch.setattr(sample, "BITS", bits)
    length = lengths_of(some_shares(0, 2 * LINE + 3 * PAGE, 2.0), 500)
    value = torch.rand(length.shape, dtype=torch.float64) * (length > 0)
    hits, found = torch.zeros_like(length), torch.zeros(3, 2, dtype=torch.float64)
    weight = (1 << bits) / length.clamp_min(1).double()
    for start in range(1 << bits):
        every = torch.full((2, 3), start)
        monkeypatch.setattr(sample, "phases", lambda *_, every=every: every)
        hit = sample.marked(length, 0)
        hits += hit
        found += (weight * hit * value).sum(-1)
    assert torch.equal(hits, length)
    torch.testing.assert_close(found / (1 << bits), value.sum(-1))


@pytest.mark.parametrize("head", [1, 2, 7])
def test_first_marks_are_fixed_and_spread_evenly_over_segments(head):
    start = sample.phases(0, 4096, 8, torch.device("cpu"))
    assert int(start.min()) >= 0 and int(start.max()) < UNIT
    assert torch.equal(sample.phases(100, 50, 8, start.device), start[:, 100:150])
    for first in (0, 11, 3000):
        counts = torch.histc(start[head, first : first + 400].double(), 20, 0, UNIT)
        assert 17 <= int(counts.min()) <= int(counts.max()) <= 23
    # Nor do neighbouring heads read the same keys where their shares are the same.
    apart = (start[head] - start[head - 1]).abs()
    assert int(torch.minimum(apart, UNIT - apart).min()) > UNIT // 10


def test_sums_over_many_segments_are_right_on_average():
    """With the first marks as they are: the same keys, segment after segment."""
    share = some_shares(1, LINE, 1.5, rows=1, kv_heads=2)
    length = lengths_of(share, 60)
    value = share * some_shares(2, LINE, 1.0, rows=1, kv_heads=2)
    long = length.repeat(1, 1, 1000)
    found = sums(length, sample.marked(long, 0).view(1, 2, 1000, -1).double().mean(2), value)
    torch.testing.assert_close(found, value.sum(-1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("period", [2, 3, 5, 8, 13, 21, 34, 55, 64, 89, 144, 233, 610, 1597, 2048])
@pytest.mark.parametrize("heavier", [1.0, 5.0, 100.0])
def test_keys_in_a_rhythm_are_sampled_as_well_as_by_independent_draws(period, heavier):
    """Over many budgets; a single one can be in step with the rhythm."""
    generator = torch.Generator().manual_seed(period)
    keys, errors, variances = 8192, [], []
    in_step = torch.arange(keys) % period == 1
    for marks in range(512, 2048, 83):
        share = torch.randn(1, 8, keys, generator=generator, dtype=torch.float64).mul(0.3).exp()
        share = torch.where(in_step, heavier * share, share)
        share /= share.sum(-1, keepdim=True)
        length, value = lengths_of(share, marks), share * in_step
        hit = sample.marked(length, 0)
        # What the shares foresee is met but for a mark a segment.
        whole = sums(length, hit, length.double()) - length.sum(-1)
        assert (whole.abs() < keys // LINE * UNIT).all()
        errors.append(sums(length, hit, value) - value.sum(-1))
        left_out = sample.log_weight(length).exp() - 1
        variances.append((value.square() * left_out).sum(-1))  # of Poisson sampling
    error, variance = torch.stack(errors), torch.stack(variances)
    assert error.square().mean() <= 1.5**2 * variance.mean() + 1e-18
    assert (error.abs() <= 6 * variance.sqrt() + 1e-9).all()


def budgets(share, held, always, visible, policy):
    return budget.marks(share, held, torch.tensor(always), torch.tensor(visible), policy)


policies = st.builds(
    lambda coverage, least, more, worth, sampled: Dynamic(
        coverage=coverage, min_keys=least, max_keys=least + more, worth=worth, sampled=sampled
    ),
    # Targets that no sum meets exactly, whatever its order.
    st.sampled_from([0.4987, 0.9013, 0.9999]),
    st.integers(1, 3000),
    st.integers(0, 9000),
    st.sampled_from([0.0, 0.31, 1.03, 2.1]),
    st.booleans(),
)
probes = st.builds(
    lambda seed, keys, sharpness, held: (
        some_shares(seed, keys, sharpness) * (1 - held) / FOURS,
        torch.full((3, 2), held, dtype=torch.float64),
    ),
    st.integers(0, 10**6),
    st.integers(1, 400),
    st.sampled_from([0.0, 1.0, 5.0]),
    st.sampled_from([0.01, 0.3, 0.95]),
)


@settings(max_examples=100, deadline=None)
@given(
    probes,
    policies,
    st.lists(st.integers(1, 400), min_size=3, max_size=3),
    st.sampled_from([0, 1, 2]),
)
def test_the_budget_is_the_reference_budget(probe, policy, always, far):
    share, held = probe
    visible = [FOURS * share.shape[-1] + one + far * FAR for one in always]
    share, each = share / 2**far, FOURS * 2**far
    actual = budgets(share, held, always, visible, policy)
    fewest = SAMPLE if policy.sampled else 0  # plain top-k takes as many keys as it is told
    for row in range(3):
        most = max(policy.max_keys - always[row], fewest)
        for head in range(2):
            marks = reference_sample.marks(
                share[row, head],
                float(held[row, head]),
                always[row],
                visible[row],
                policy,
                fewest,
                each,
            )
            assert int(actual[row, head]) == marks
            assert min(max(policy.min_keys - always[row], fewest), most) <= marks <= most


@settings(max_examples=60, deadline=None)
@given(probes, policies, policies)
def test_more_marks_for_more_coverage_and_more_keys(probe, one, two):
    rest = (*probe, [100, 200, 300], [9000, 9000, 9000])
    targets = sorted((one.coverage, two.coverage))
    few, many = (budgets(*rest, replace(one, coverage=part)) for part in targets)
    assert (few <= many).all()
    # Where more are always worth it: the end of a doubling may be, and the next doubling not.
    one = replace(one, worth=0.0)
    most = sorted((one.max_keys, one.min_keys + two.max_keys))
    few, many = (budgets(*rest, replace(one, max_keys=keys)) for keys in most)
    assert (few <= many).all()


def test_marks_end_where_coverage_is_reached_or_more_are_not_worth_it():
    level = torch.full((1, 1, 500), 1 / (500 * FOURS))
    sharp = torch.tensor([[[0.5, *[1e-4] * 499]]]) / FOURS
    none = torch.zeros(1, 1)

    def of(share, **changes):
        policy = Dynamic(**{"coverage": 1.0, "min_keys": 0, "max_keys": 100_000} | changes)
        return int(budgets(share, none, [1], [8001], policy))

    assert of(level, worth=1.01) == SAMPLE  # no key carries more than the average
    assert of(level, worth=0.99, coverage=0.5) == 8 * SAMPLE  # of 8000 keys: 51%
    assert of(level, worth=0.99, max_keys=1001) == 1000
    assert of(level, worth=1.01, min_keys=601) == 600
    assert of(level, worth=1.01, min_keys=0, max_keys=1) == SAMPLE
    assert of(sharp, worth=0.0, coverage=0.49) == SAMPLE


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_probed_keys_are_at_every_place_of_a_page(first, apart):
    visible = torch.tensor([FAR * apart // 2, 1])
    assert budget.apart(visible).tolist() == [apart, 1]
    first, pages = first * apart * FOURS if apart > 1 else first, apart * FOURS
    position, there = budget.probed(first, pages, visible)
    assert bool(there[1].all())
    found = position[there[0]]
    assert (found % PAGE).sort().values.tolist() == list(range(PAGE))
    assert (found // PAGE // apart)[::PROBE].tolist() == list(range(FOURS))
    late, still = budget.probed(first + 3, pages - 3, visible)
    assert torch.equal(position[3 * PROBE :], late + 3 * PAGE)
    assert torch.equal(there[:, 3 * PROBE :], still)


@pytest.mark.parametrize(
    ("impl", "gain", "seeds"),
    [(Impl.NUMBA, 0.5, 16), (Impl.NUMBA, 1.0, 16), (Impl.TORCH, 0.5, 4)],  # the latter is slow
)
def test_a_sample_comes_nearer_to_dense_attention_than_the_greatest_keys(paged, impl, gain, seeds):
    """Where values follow the keys, those of the greatest mass are no sample of all."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(seeds):
        case = paged([8192], 4, 64, seed=seed, queries=4)
        direction = torch.randn(64, generator=case.generator)
        keys = case.cache.kv[..., 0, :]
        case.cache.kv[..., 1, :] = (keys @ direction / 8)[..., None] + case.cache.kv[..., 1, :] / 8
        query = case.query(2) * gain
        rest = (query, case.cache, case.rows)
        dense, _ = dense_decode(*rest, 0.125)
        for sampled in errors:
            policy = Dynamic(coverage=1.0, min_keys=512, max_keys=512, sampled=sampled)
            found = dynamic.attend(*rest, policy, 0.125, impl=impl)
            errors[sampled] += float((found.output - dense).norm())
    assert errors[True] < errors[False] / 2


@IMPLS
def test_a_sample_of_level_attention_stands_for_the_whole_context(paged, impl):
    case = paged([4096], 2, 32)
    case.cache.kv[..., 0, :] = 0.0
    case.cache.code(torch.tensor(case.tables[0]))
    policy = Dynamic(coverage=1.0, min_keys=512, max_keys=512)
    query = case.query(2)
    found = dynamic.attend(query, case.cache, case.rows, policy, SCALE, impl=impl)
    # 16 sinks and 64 recent keys. Two of the first page's probed keys are sinks: 62 pages and a
    # half show their mass.
    shown = (4096 - 80) / (62.5 * PAGE + 80)
    assert ((found.keys - 80 - SAMPLE * shown).abs() < 4).all()  # of four segments
    keys = found.keys.repeat_interleave(2, 1).to(query.dtype)
    torch.testing.assert_close(found.lse, torch.full_like(keys, 4096).log(), atol=5e-3, rtol=0)
    torch.testing.assert_close(found.own, keys.log(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.coverage, keys / 4096, atol=0, rtol=5e-3)
