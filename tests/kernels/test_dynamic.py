"""Dynamic selection: what it always keeps, what it finds, and how it judges itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import budget, dynamic, judge, reference
from kernels.attention import Impl, dense_attention, selected_attention
from kernels.cache import Segment
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.patterns import Pattern
from kernels.policy import Dynamic

SCALE = 0.25
IMPLS = pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
WHOLE = pytest.mark.parametrize("whole", [0, 16_384], ids=["two levels", "every key scored"])


def exact_coverage(case, query, selection):
    """True share of the softmax mass on the selected keys: [rows, heads], float64."""
    group = query.shape[1] // case.kv_heads
    rows = []
    for row in range(query.shape[0]):
        sequence = row // case.rows.queries
        n = int(case.rows.lengths[row])
        keys = case.keys[sequence][:n].double().repeat_interleave(group, 1)  # [n, heads, d]
        weights = (torch.einsum("hd,nhd->hn", query[row].double(), keys) * SCALE).softmax(-1)
        mass = []
        for head in range(query.shape[1]):
            picked = selection.indices[row, head // group]
            mass.append(weights[head, picked[picked >= 0]].sum())
        rows.append(torch.stack(mass))
    return torch.stack(rows)


@WHOLE
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (3, 4), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_budget_of_every_key_is_dense_attention(paged, whole, kv_heads, group, dtype):
    lengths = [1, 64, 130, 700]
    case = paged(lengths, kv_heads, 16, dtype)
    query = case.query(group)
    policy = Dynamic(coverage=1.0, min_keys=700, max_keys=700, whole=whole)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    choice.selection.validate(case.rows.lengths)
    assert (choice.selection.counts == case.rows.lengths[:, None]).all()
    output, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
    assert (choice.coverage(lse) == 1).all()
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for row, n in enumerate(lengths):
        segment = Segment.of(case.tables[row], n - 1, 1, query.device)
        dense = dense_attention(query[row : row + 1], case.cache, segment, SCALE)
        torch.testing.assert_close(output[row : row + 1], dense, atol=tolerance, rtol=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_budget_is_the_reference_budget(data):
    n = data.draw(st.integers(1, 300))
    seed = data.draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    sharpness = data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    # Rounded scores tie often, so that the order among equals is tested too.
    scores = (torch.randn(3, 2, n, generator=generator) * sharpness).mul(4).round().div(4)
    importance = scores.double().softmax(-1)
    kept = torch.rand(3, 2, n, generator=generator) < data.draw(st.sampled_from([0.0, 0.2]))
    eligible = torch.rand(3, 2, n, generator=generator) < 0.9
    kept &= eligible
    most = data.draw(st.integers(143, 400))
    least = data.draw(st.integers(0, most))
    # Targets that no sum of equal shares meets exactly, whatever the order of the sum.
    coverage = data.draw(st.sampled_from([0.4987, 0.9013, 0.9999]))
    worth = data.draw(st.sampled_from([0.0, 1.03, 2.1]))
    policy = Dynamic(coverage=coverage, min_keys=least, max_keys=most, worth=worth)
    visible = torch.tensor([n, n + 7, 2 * n])
    actual = budget.cut_by_mass(importance, kept, eligible, visible, policy)
    for row in range(3):
        for head in range(2):
            one = (importance[row, head], kept[row, head], eligible[row, head])
            share = worth / int(visible[row])
            expected = reference.cut_by_mass(*one, coverage, least, most, share)
            assert torch.equal(actual[row, head], expected)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 250, 300])
def test_the_best_are_the_greatest_and_of_equals_the_first(count):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(4, 2, 300, generator=generator).exp().mul(8).round().div(8)  # with ties
    scores[0, 0, :5] = torch.inf
    scores[1, 0, 40:] = -1
    scores[2, 1, ::2] = -1
    scores[3, 0] = 0.25
    found = budget.best(scores, count)
    for row in range(4):
        for head in range(2):
            one = scores[row, head].tolist()
            ranked = sorted((i for i in range(300) if one[i] >= 0), key=lambda i: (-one[i], i))
            expected = sorted(ranked[:count])
            assert found[row, head].tolist() == expected + [-1] * (count - len(expected))


@IMPLS
@WHOLE
def test_sinks_and_the_recent_window_are_always_kept(paged, impl, whole):
    lengths = [5, 64, 127, 128, 1000, 1024]
    case = paged(lengths, 2, 16)
    policy = Dynamic(coverage=0.01, min_keys=0, max_keys=200, sinks=7, whole=whole)
    choice = dynamic.select(case.query(2), case.cache, case.rows, policy, SCALE, impl=impl)
    for row, n in enumerate(lengths):
        for head in range(2):
            keys = set(choice.selection.indices[row, head].tolist()) - {-1}
            window = range(max(0, n // PAGE - 1) * PAGE, n)
            assert keys >= set(window) | set(range(min(7, n)))
            assert min(n, 64) <= len(window) <= 127 or n < 64


@IMPLS
@WHOLE
def test_one_sharp_key_is_found_wherever_it_stands(paged, impl, whole):
    generator = torch.Generator().manual_seed(3)
    for position in torch.randint(20, 7900, (12,), generator=generator).tolist():
        case = paged([8192], 2, 64, seed=position)
        query = case.query(2)
        spike = query.view(2, 2, 64)[:, 0] * 3
        slots = case.rows.slots(torch.tensor([[position]]))[0]
        case.cache.write(slots, spike[None], case.values[0][position][None])
        case.cache.code(slots // PAGE)
        choice = dynamic.select(
            query, case.cache, case.rows, Dynamic(max_keys=256, whole=whole), 0.125, impl=impl
        )
        assert (choice.selection.indices == position).any(-1).all()


@WHOLE
def test_a_row_is_chosen_alike_alone_and_in_company(paged, whole):
    together = paged([900, 3000, 70], 2, 16, torch.float64, queries=3)
    policy = Dynamic(coverage=0.9, min_keys=150, max_keys=300, whole=whole)
    query = together.query(2)
    all_rows = dynamic.select(query, together.cache, together.rows, policy, SCALE)
    alone = paged([900, 3000, 70], 2, 16, torch.float64, queries=1)
    for sequence in range(3):
        for row in range(3):
            one = type(alone.rows)(
                together.rows.block_tables[sequence : sequence + 1],
                together.rows.lengths[3 * sequence + row][None],
                together.rows.starts[:1],
            )
            index = 3 * sequence + row
            choice = dynamic.select(query[index : index + 1], together.cache, one, policy, SCALE)
            count = int(choice.selection.counts.max())
            assert torch.equal(
                choice.selection.indices[0], all_rows.selection.indices[index, :, :count]
            )
            torch.testing.assert_close(choice.log_rest[0], all_rows.log_rest[index])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_short_and_long_contexts_together_are_chosen_as_alone(paged, dtype):
    lengths = [100, 5000, 64, 9000, 3, 8191]
    case = paged(lengths, 3, 16, dtype, queries=2)
    policy = Dynamic(coverage=0.9, min_keys=0, max_keys=200, whole=2000)
    query = case.query(2)
    together = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    together.selection.validate(case.rows.lengths)
    for row in range(len(lengths) * 2):
        one = case.rows.only(torch.tensor([row]))
        alone = dynamic.select(query[row : row + 1], case.cache, one, policy, SCALE)
        count = alone.selection.indices.shape[2]
        assert torch.equal(alone.selection.indices[0], together.selection.indices[row, :, :count])
        torch.testing.assert_close(alone.log_rest[0], together.log_rest[row])


@WHOLE
def test_products_beyond_float16_are_scored(paged, whole):
    case = paged([3000], 1, 64, torch.float16)
    case.cache.kv[..., 0, :8] = 100.0
    case.cache.code(torch.tensor(case.tables[0][:46]))
    query = case.query(2)
    query[..., :8] = 90.0  # 72,000 before the scale, over float16's 65,504
    choice = dynamic.select(query, case.cache, case.rows, Dynamic(whole=whole), 0.125)
    _, lse = selected_attention(query, case.cache, case.rows, choice.selection, 0.125)
    assert torch.isfinite(choice.coverage(lse)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 4, 8])
def test_the_audit_knows_the_true_coverage(paged, dtype, gain):
    case = paged([700, 4096], 2, 32, dtype, queries=2)
    query = case.query(2) * gain
    policy = Dynamic(coverage=0.7, min_keys=0, max_keys=300, whole=0)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    _, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
    rest = (query, case.cache, case.rows, choice.selection, lse, SCALE)
    audited = judge.true_coverage(*rest).double()
    truth = exact_coverage(case, query, choice.selection)
    tolerance = 3e-3 if dtype is torch.bfloat16 else 1e-5
    assert (audited - truth).abs().max() < tolerance


@WHOLE
def test_rows_are_chosen_alike_when_gathers_are_cut(paged, whole, monkeypatch):
    case = paged([2000], 2, 16, torch.float64, queries=9)
    query, policy = case.query(3), Dynamic(coverage=0.8, min_keys=0, max_keys=500, whole=whole)
    uncut = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    expected = selected_attention(query, case.cache, case.rows, uncut.selection, SCALE)
    monkeypatch.setattr("kernels.torch_backend.GATHER_BYTES", 1 << 18)
    cut = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    assert torch.equal(cut.selection.indices, uncut.selection.indices)
    actual = selected_attention(query, case.cache, case.rows, cut.selection, SCALE)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)


@IMPLS
@WHOLE
def test_the_coverage_estimate_is_near_the_truth_on_normal_keys(paged, impl, whole):
    case = paged([4096, 8192], 2, 32)
    query = case.query(2)
    for most in (200, 500, 1000):
        policy = Dynamic(coverage=1.0, min_keys=0, max_keys=most, whole=whole)
        choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
        _, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
        truth = exact_coverage(case, query, choice.selection)
        assert (choice.coverage(lse).double() - truth).abs().max() < 0.03


@IMPLS
@pytest.mark.parametrize("most", [150, 300, 1000])
@pytest.mark.parametrize("rescored", [1, 4])
@pytest.mark.parametrize("gain", [0.5, 1])
def test_the_coverage_estimate_is_unbiased_where_few_keys_are_rescored(
    paged, impl, gain, rescored, most
):
    case = paged([8192], 4, 64, queries=6)
    query = case.query(3) * gain
    policy = Dynamic(coverage=1.0, min_keys=0, max_keys=most, rescored=rescored, whole=0)
    choice = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
    _, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
    error = choice.coverage(lse).double() - exact_coverage(case, query, choice.selection)
    assert error.mean().abs() < 0.015
    assert error.abs().mean() < 0.02


@IMPLS
@pytest.mark.parametrize("text", ["sinks:16+window:100", "window:500", "strided:3+window:64"])
def test_a_fixed_pattern_is_judged_by_the_same_codes(paged, impl, text):
    lengths = [50, 500, 4096]
    case = paged(lengths, 2, 32)
    query = case.query(2)
    pattern = Pattern.parse(text)
    selection = pattern.select(case.rows.lengths, case.rows.starts, 2)
    selection.validate(case.rows.lengths)
    choice = judge.rest_of(query, case.cache, case.rows, selection, SCALE, impl)
    _, lse = selected_attention(query, case.cache, case.rows, selection, SCALE)
    truth = exact_coverage(case, query, selection)
    assert (choice.coverage(lse).double() - truth).abs().max() < 0.08


@IMPLS
@WHOLE
def test_keys_behind_a_sliding_window_are_never_chosen(paged, impl, whole):
    case = paged([3000], 2, 16)
    rows = case.rows.within(1000)
    for policy in (
        Dynamic(min_keys=600, whole=whole),
        Dynamic(min_keys=2000, max_keys=2000, whole=whole),
    ):
        choice = dynamic.select(case.query(2), case.cache, rows, policy, SCALE, impl=impl)
        chosen = choice.selection.indices[choice.selection.indices >= 0]
        assert int(chosen.min()) >= 2000
        assert int(choice.selection.counts.max()) <= 1000


@IMPLS
@WHOLE
def test_a_score_that_is_not_finite_shows_as_nan_coverage_of_its_row_alone(paged, impl, whole):
    case = paged([700, 900], 1, 16)
    query = case.query(2)
    query[0, 1, 3] = torch.inf
    choice = dynamic.select(query, case.cache, case.rows, Dynamic(whole=whole), SCALE, impl=impl)
    _, lse = selected_attention(query, case.cache, case.rows, choice.selection, SCALE)
    coverage = choice.coverage(lse)
    assert torch.isnan(coverage[0]).any()
    assert torch.isfinite(coverage[1]).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("coverage", 0.0),
        ("coverage", 1.1),
        ("max_keys", 0),
        ("min_keys", 5000),
        ("sinks", 65),
        ("rescored", 0),
        ("worth", -1.0),
    ],
)
def test_a_budget_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(KernelError, match=field):
        Dynamic(**{field: value})
