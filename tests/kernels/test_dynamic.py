"""Dynamic selection: what it always keeps, what it finds, and how it judges itself."""

from __future__ import annotations

import pytest
import torch

from kernels import dynamic, judge
from kernels.attention import Impl, dense_attention, selected_attention
from kernels.budget import FAR
from kernels.cache import Segment
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic

SCALE = 0.25
IMPLS = pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])


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


def estimated_coverage(case, query, selection, impl=Impl.TORCH):
    rest = (query, case.cache, case.rows, selection)
    _, lse, own = selected_attention(*rest, SCALE)
    return judge.estimated_coverage(*rest, lse, own, SCALE, impl)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (3, 4), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_budget_of_every_key_is_dense_attention(paged, kv_heads, group, dtype):
    lengths = [1, 64, 130, 700]
    case = paged(lengths, kv_heads, 16, dtype)
    query = case.query(group)
    policy = Dynamic(coverage=1.0, min_keys=700, max_keys=700)
    selection = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    selection.validate(case.rows.lengths)
    assert (selection.counts == case.rows.lengths[:, None]).all()
    output, *_ = selected_attention(query, case.cache, case.rows, selection, SCALE)
    assert (estimated_coverage(case, query, selection) == 1).all()
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for row, n in enumerate(lengths):
        segment = Segment.of(case.tables[row], n - 1, 1, query.device)
        dense = dense_attention(query[row : row + 1], case.cache, segment, SCALE)
        torch.testing.assert_close(output[row : row + 1], dense, atol=tolerance, rtol=tolerance)


@IMPLS
def test_sinks_and_the_recent_window_are_always_kept(paged, impl):
    lengths = [5, 64, 127, 128, 1000, 1024]
    case = paged(lengths, 2, 16)
    policy = Dynamic(coverage=0.01, min_keys=0, max_keys=200, sinks=7)
    selection = dynamic.select(case.query(2), case.cache, case.rows, policy, SCALE, impl=impl)
    for row, n in enumerate(lengths):
        for head in range(2):
            keys = set(selection.indices[row, head].tolist()) - {-1}
            window = range(max(0, n // PAGE - 1) * PAGE, n)
            assert keys >= set(window) | set(range(min(7, n)))
            assert min(n, 64) <= len(window) <= 127 or n < 64


@IMPLS
@pytest.mark.parametrize("context", [8192, 2 * FAR + 300])
def test_one_sharp_key_is_found_wherever_it_stands(paged, impl, context):
    """One for each KV head: sharp enough to matter, too little to show in its page's mean."""
    heads, generator = 6, torch.Generator().manual_seed(3)
    case = paged([context], heads, 64)
    query = case.query(2)
    for _ in range(3):
        positions = torch.randint(20, context - 300, (heads,), generator=generator)
        spikes = query.view(heads, 2, 64)[:, 0] * 1.25
        for head, position in enumerate(positions.tolist()):
            keys, values = case.keys[0][position].clone(), case.values[0][position]
            keys[head] = spikes[head]
            slots = case.rows.slots(torch.tensor([[position]]))[0]
            case.cache.write(slots, keys[None], values[None])
            case.cache.code(slots // PAGE)
        policy = Dynamic(min_keys=0, max_keys=256)
        selection = dynamic.select(query, case.cache, case.rows, policy, 0.125, impl=impl)
        assert (selection.indices[0] == positions[:, None]).any(-1).all()


def test_a_row_is_chosen_alike_alone_and_in_company(paged):
    together = paged([900, 3000, 70], 2, 16, torch.float64, queries=3)
    policy = Dynamic(coverage=0.9, min_keys=150, max_keys=300)
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
            selection = dynamic.select(query[index : index + 1], together.cache, one, policy, SCALE)
            count = int(selection.counts.max())
            assert torch.equal(selection.indices[0], all_rows.indices[index, :, :count])
            weight = all_rows.log_weight[index, :, :count]
            torch.testing.assert_close(selection.log_weight[0], weight)


def test_products_beyond_float16_are_scored(paged):
    case = paged([3000], 1, 64, torch.float16)
    case.cache.kv[..., 0, :8] = 100.0
    case.cache.code(torch.tensor(case.tables[0][:46]))
    query = case.query(2)
    query[..., :8] = 90.0  # 72,000 before the scale, over float16's 65,504
    selection = dynamic.select(query, case.cache, case.rows, Dynamic(), 0.125)
    assert torch.isfinite(estimated_coverage(case, query, selection)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 4, 8])
def test_the_audit_knows_the_true_coverage(paged, dtype, gain):
    case = paged([700, 4096], 2, 32, dtype, queries=2)
    query = case.query(2) * gain
    policy = Dynamic(coverage=0.7, min_keys=0, max_keys=300)
    selection = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    _, _, own = selected_attention(query, case.cache, case.rows, selection, SCALE)
    rest = (query, case.cache, case.rows, selection, own, SCALE)
    audited = judge.true_coverage(*rest).double()
    truth = exact_coverage(case, query, selection)
    tolerance = 3e-3 if dtype is torch.bfloat16 else 1e-5
    assert (audited - truth).abs().max() < tolerance


def test_rows_are_chosen_alike_when_gathers_are_cut(paged, monkeypatch):
    case = paged([2000], 2, 16, torch.float64, queries=9)
    query, policy = case.query(3), Dynamic(coverage=0.8, min_keys=0, max_keys=500)
    uncut = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    expected = selected_attention(query, case.cache, case.rows, uncut, SCALE)
    monkeypatch.setattr("kernels.torch_selected.GATHER_BYTES", 1 << 18)
    cut = dynamic.select(query, case.cache, case.rows, policy, SCALE)
    assert torch.equal(cut.indices, uncut.indices)
    actual = selected_attention(query, case.cache, case.rows, cut, SCALE)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)


@IMPLS
@pytest.mark.parametrize("most", [300, 1000, 2000])
@pytest.mark.parametrize("gain", [0.25, 0.5, 0.75])
def test_the_coverage_estimate_of_a_sample_is_unbiased(paged, impl, gain, most):
    case = paged([8192], 4, 64, queries=6)
    query = case.query(3) * gain
    policy = Dynamic(coverage=1.0, min_keys=0, max_keys=most)
    selection = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
    shown = estimated_coverage(case, query, selection, impl).double()
    error = shown - exact_coverage(case, query, selection)
    assert error.mean().abs() < 0.008
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
    shown = estimated_coverage(case, query, selection, impl).double()
    assert (shown - exact_coverage(case, query, selection)).abs().max() < 0.08


@IMPLS
def test_keys_behind_a_sliding_window_are_never_chosen(paged, impl):
    case = paged([3000], 2, 16)
    rows = case.rows.within(1000)
    for policy in (
        Dynamic(min_keys=600),
        Dynamic(min_keys=2000, max_keys=2000),
    ):
        selection = dynamic.select(case.query(2), case.cache, rows, policy, SCALE, impl=impl)
        chosen = selection.indices[selection.indices >= 0]
        assert int(chosen.min()) >= 2000
        assert int(selection.counts.max()) <= 1000


@IMPLS
def test_a_score_that_is_not_finite_shows_as_nan_coverage_of_its_row_alone(paged, impl):
    case = paged([700, 900], 1, 16)
    query = case.query(2)
    query[0, 1, 3] = torch.inf
    selection = dynamic.select(query, case.cache, case.rows, Dynamic(), SCALE, impl=impl)
    coverage = estimated_coverage(case, query, selection, impl)
    assert torch.isnan(coverage[0]).any()
    assert torch.isfinite(coverage[1]).all()


@IMPLS
@pytest.mark.parametrize(
    ("length", "value"),
    [(500, torch.nan), (2700, torch.nan), (2700, torch.inf), (2700, -torch.inf)],
)
def test_a_key_that_is_not_finite_shows_though_it_is_not_read(paged, impl, length, value):
    """Where it is probed nothing is known of any key; those always read may all be finite."""
    case = paged([length, length], 1, 16)
    page = torch.tensor(case.tables[0][3:4])
    case.cache.kv[0, page, 5, 0] = value
    case.cache.code(page)
    query = case.query(2)
    found = dynamic.attend(query, case.cache, case.rows, Dynamic(), SCALE, impl=impl)
    assert torch.isnan(found.coverage[0]).any()
    assert torch.isfinite(found.coverage[1]).all() and torch.isfinite(found.output[1]).all()


@IMPLS
@pytest.mark.parametrize("gain", [12, 16, 20, 1e20])
@pytest.mark.parametrize("position", [1000, 1003])
def test_a_peak_that_was_not_probed_is_read(paged, impl, gain, position):
    """It may be as many times the mass of the probed keys as float32 cannot hold; so its code."""
    case = paged([8192], 1, 128)
    query = case.query(2)
    slots = case.rows.slots(torch.tensor([[position]]))[0]
    case.cache.write(slots, query[:, :1] * gain, query[:, :1])
    case.cache.code(slots // PAGE)
    found = dynamic.attend(query, case.cache, case.rows, Dynamic(), 0.09, impl=impl)
    assert found.selection is not None and (found.selection.indices == position).any()
    assert torch.isfinite(found.coverage).all() and found.coverage[0, 0] > 0.999
    torch.testing.assert_close(found.output[0, 0], query[0, 0])


@IMPLS
def test_rows_too_short_for_a_choice_read_all(paged, impl):
    case = paged([1, 63, 70, 127], 2, 16)
    selection = dynamic.select(case.query(2), case.cache, case.rows, Dynamic(), SCALE, impl=impl)
    selection.validate(case.rows.lengths)
    assert (selection.counts == case.rows.lengths[:, None]).all()


@IMPLS
@pytest.mark.parametrize("gain", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("most", [1000, 2000])
def test_at_most_about_max_keys_are_read(paged, impl, gain, most):
    """Shares are estimates, and sum to about 1."""
    case = paged([8192, 20_000, FAR + 100], 2, 64, queries=4)
    query = case.query(2) * gain
    policy = Dynamic(coverage=1.0, min_keys=0, max_keys=most, worth=0.0)
    counts = dynamic.select(query, case.cache, case.rows, policy, 0.125, impl=impl).counts
    assert int(counts.max()) <= 1.1 * most


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("coverage", 0.0),
        ("coverage", 1.1),
        ("max_keys", 0),
        ("min_keys", 5000),
        ("sinks", 65),
        ("worth", -1.0),
    ],
)
def test_a_budget_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(KernelError, match=field):
        Dynamic(**{field: value})
