"""Triton's selection and attention: by torch's rules, from its own estimates."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
import triton
import triton.language as tl

from kernels import budget, dynamic, judge, sample
from kernels.attention import Impl, dense_decode, selected_attention
from kernels.budget import marks, probed
from kernels.cache import LayerCache, Rows
from kernels.codes import FLOAT8
from kernels.gpu import float8
from kernels.gpu import layout as layout_module
from kernels.gpu.decode import look_over
from kernels.gpu.layout import HELD, Layout, Scratch
from kernels.gpu.prepare import LOG2E
from kernels.gpu.scan import scan
from kernels.masses import estimate_masses
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic
from tests.interpreter import programs

if TYPE_CHECKING:
    from kernels.selection import Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.25
POLICIES = {
    "mass": Dynamic(coverage=0.8, min_keys=0, max_keys=2000, worth=0.2),
    "most keys": Dynamic(coverage=0.999, min_keys=0, max_keys=1500, worth=0.0),
    "worth": Dynamic(coverage=0.999, min_keys=130, max_keys=3000, worth=0.6),
    "a fixed number": Dynamic(min_keys=700, max_keys=700),
    "all keys": Dynamic(coverage=1.0, min_keys=4000, max_keys=4000),
}
PLAIN = Dynamic(coverage=1.0, min_keys=600, max_keys=600, sampled=False)
CASES = [
    # Two programs scan a line, and then others read what is met; or one does, and reads it, too.
    ((2, 2, 64), torch.float32, "a fixed number", (2, 2)),
    ((2, 2, 64), torch.float32, "all keys", (2, 1)),
    ((2, 2, 64), torch.float16, "mass", (1, 2)),
    ((1, 4, 128), torch.float32, "a fixed number", (1, 1)),
    ((1, 3, 96), torch.float32, "mass", (2, 1)),
    ((1, 9, 16), torch.float32, "a fixed number", (1, 2)),
    ((1, 1, 80), torch.float16, "a fixed number", (2, 1)),
    ((1, 5, 256), torch.float32, "a fixed number", (1, 1)),
    # In lanes, also of more heads than a product has.
    ((1, 4, 128), torch.float16, "a fixed number", (1, 1)),
    ((1, 9, 64), torch.float16, "mass", (2, 2)),
]
"""KV heads, group and head dimension; dtype; policy; and the interpreter's programs of a line."""
if DEVICE == "cuda":  # the same for all dtypes, with the programs that a GPU gets
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    kinds = dict.fromkeys((shape, name) for shape, _, name, _ in CASES)
    CASES = [(shape, dtype, name, None) for shape, name in kinds for dtype in dtypes]

pytestmark = pytest.mark.usefixtures("few_programs")


@dataclass
class Case:
    """Rows on the device under test."""

    query: torch.Tensor
    cache: LayerCache
    rows: Rows

    @property
    def layout(self):
        return self.query, self.cache, self.rows


@pytest.fixture(scope="module")
def make(paged):
    def build(
        kv_heads, group, head_dim, lengths=(40, 128, 1213), *,
        dtype=torch.float32, gain=1.0, queries=1, starts=None,
    ):  # fmt: skip
        case = paged(list(lengths), kv_heads, head_dim, dtype, seed=group, queries=queries)
        query = (case.query(group) * gain).to(dtype)
        parts = case.cache.parts
        rows = case.rows
        starts = rows.starts if starts is None else torch.tensor(starts)
        return Case(
            query.to(DEVICE),
            LayerCache(*(part.to(DEVICE) for part in parts)),
            Rows(*(part.to(DEVICE) for part in (rows.block_tables, rows.lengths, starts))),
        )

    return build


def select(case, policy, impl=Impl.TRITON):
    return dynamic.select(*case.layout, policy, SCALE, impl=impl)


def attend(case, policy):
    return dynamic.attend(*case.layout, policy, SCALE, impl=Impl.TRITON)


def estimated(case, policy):
    """What the kernels leave in memory, and every key's share by their estimates."""
    layout, scratch = look_over(*case.layout, policy, SCALE)
    shares = torch.zeros(layout.lines, layout.pages * PAGE, device=DEVICE)
    rest = (policy.sinks, SCALE, layout, scratch)
    scan(case.query, case.cache, case.rows, *rest, shares=shares)
    rows = len(case.rows.lengths)
    return layout, scratch, shares.view(rows, layout.kv_heads, -1)


@dataclass
class Found:
    """What one policy finds in one case, told in three ways."""

    case: Case
    policy: Dynamic
    layout: Layout
    scratch: Scratch
    share: torch.Tensor  # [rows, kv_heads, keys]
    selection: Selection
    attended: dynamic.Attended

    @property
    def tolerance(self):
        return {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[
            self.case.query.dtype
        ]


def name_of(case):
    shape, dtype, name, _ = case
    return "-".join((*map(str, shape), str(dtype).split(".")[1], name))


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def found(make, request):
    """Once for all tests of it: each of the three is a scan."""
    (kv_heads, group, head_dim), dtype, name, few = request.param
    gain = 0.4 * (64 / head_dim) ** 0.5
    case = make(kv_heads, group, head_dim, (130, 1213), dtype=dtype, gain=gain)
    policy = POLICIES[name]
    with programs(*few) if few else nullcontext():
        told = estimated(case, policy)
        return Found(case, policy, *told, select(case, policy), attend(case, policy))


def weights_by_key(selection, row, head):
    """Log-weight of each selected key."""
    keys = selection.indices[row, head].tolist()
    weights = selection.log_weight
    weights = [0.0] * len(keys) if weights is None else weights[row, head].tolist()
    return {key: weight for key, weight in zip(keys, weights, strict=True) if key >= 0}


def check_marks(case, policy, scratch, share, selection):
    """The keys and weights are those of torch's rules on the same shares."""
    rows, sinks = case.rows, policy.sinks
    number = scratch.marks.view(share.shape[:2])
    position = torch.arange(share.shape[-1], device=DEVICE)
    stop = rows.recent_page[:, None] * PAGE
    free = (position < stop) & (position >= sinks) & (position >= rows.starts[:, None])
    length = sample.lengths(share, number.clamp_min(0), everything=number < 0) * free[:, None]
    expected = sample.marked(length, 0)
    selection.validate(rows.lengths)
    for row, (start, end) in enumerate(
        zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
    ):
        window = set(range(max(int(stop[row]), start), end)) | set(range(start, min(end, sinks)))
        for head in range(share.shape[1]):
            weights = weights_by_key(selection, row, head)
            wanted = set(position[expected[row, head]].tolist())
            # A length that lies between two whole numbers may be rounded to the other one.
            other = (weights.keys() - window) ^ wanted
            assert len(other) <= 2
            for key in wanted & weights.keys():
                told = float(sample.log_weight(length[row, head, key]))
                unit = 2.0**-sample.BITS * math.exp(told)
                assert weights[key] == pytest.approx(told, abs=1e-5 + 1.1 * unit)


def test_the_marks_fall_as_torchs_do_on_the_same_shares(found):
    check_marks(found.case, found.policy, found.scratch, found.share, found.selection)


@pytest.mark.parametrize("spans", [1, 3])  # of eight segments, and of two
def test_marks_fall_alike_whoever_looks_for_them(make, spans):
    """Also where a window begins in a program's second segment."""
    case = make(1, 2, 64, lengths=(4300, 3000), starts=(0, 1500), gain=0.4)
    policy = POLICIES["a fixed number"]
    with programs(spans, 1):
        layout, scratch, share = estimated(case, policy)
        selection = select(case, policy)
        assert layout.spans == spans
    check_marks(case, policy, scratch, share, selection)


@pytest.mark.parametrize("biased", [False, True])
def test_two_programs_keys_are_read_as_each_ones_are(make, monkeypatch, biased):
    """Also where the last one has no neighbour."""
    case = make(1, 4, 64, lengths=(4300,), dtype=torch.float16)
    if biased:
        case.cache = case.cache.biased(2.0 ** -torch.arange(4, 8.0, device=DEVICE))
    with programs(5, 1):
        alone = attend(case, POLICIES["a fixed number"])
        monkeypatch.setattr(layout_module, "ALONE", 1)
        joined = attend(case, POLICIES["a fixed number"])
        assert Layout.of(case.query, case.cache, case.rows).spans == 5
    assert torch.equal(alone.keys, joined.keys)
    torch.testing.assert_close(joined.output, alone.output, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(joined.lse, alone.lse, atol=1e-5, rtol=1e-5)


def test_estimates_are_torchs_but_for_the_querys_rounding(found):
    case, sinks = found.case, found.policy.sinks
    group, dtype = found.layout.group, case.query.dtype
    known = estimate_masses(*case.layout, sinks, SCALE)
    norm = found.scratch.norm[:, :group].reshape(known.norm.shape) / LOG2E.value
    torch.testing.assert_close(norm, known.norm, atol=0.1, rtol=0)
    there = known.free[:, None].expand(-1, found.layout.kv_heads, -1)
    apart = (found.share[..., : there.shape[-1]].log() - known.shares().log())[there]
    # Four bits a channel of the query: a fifth of what the keys' one sign loses.
    assert float(apart.abs().mean()) < 0.09 and float(apart.abs().max()) < 0.6
    held = found.scratch.held[:, :group].reshape(*known.norm.shape, HELD)
    exact = known.held.nan_to_num(neginf=-1e9)
    actual = torch.cat((held[..., :sinks], held[..., PAGE:]), dim=-1) / LOG2E.value
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual.nan_to_num(neginf=-1e9), exact, atol=tolerance, rtol=1e-3)
    assert found.layout.pages == case.rows.block_tables.shape[1]


def test_attention_reads_what_is_selected(found):
    output, lse, own = selected_attention(*found.case.layout, found.selection, SCALE)
    actual = found.attended
    near = {"atol": found.tolerance, "rtol": found.tolerance}
    torch.testing.assert_close(actual.output, output, **near)
    for ours, theirs in ((actual.lse, lse), (actual.own, own)):
        torch.testing.assert_close(ours, theirs, atol=found.tolerance, rtol=1e-4)
    torch.testing.assert_close(actual.coverage, (actual.own - actual.lse).exp())
    assert torch.equal(actual.keys.long(), found.selection.counts)


@pytest.mark.parametrize("far", [640, 1500])  # one page in four and one in two
def test_the_budget_is_torchs_on_the_same_probes(make, monkeypatch, far):
    monkeypatch.setattr(budget, "FAR", far)
    case = make(2, 2, 64, lengths=(2500, 1300), starts=(0, 700), gain=0.4)
    # What keys carry does not depend on the budget.
    _, scratch, share = estimated(case, POLICIES["mass"])
    known = estimate_masses(*case.layout, POLICIES["mass"].sinks, SCALE)
    norm = scratch.norm[:, :2].reshape(known.norm.shape) / LOG2E.value
    torch.testing.assert_close(norm, known.norm, atol=0.25, rtol=0)  # of what the window has
    pages = int(case.rows.recent_page.max())
    held = (scratch.held[:, :2] - scratch.norm[:, :2, None]).exp2().sum(-1).mean(-1)
    numbers = []
    for name, policy in POLICIES.items():
        _, scratch = look_over(*case.layout, policy, SCALE)
        position, there = probed(0, pages, case.rows.visible)
        some = share[..., position].masked_fill(~there[:, None], 0.0)
        always = known.seen.sum(-1)
        expected = marks(some, held.view(2, 2), always, case.rows.visible, policy)
        expected = torch.where(expected >= known.free.sum(-1)[:, None], -1, expected)
        assert torch.equal(scratch.marks.view(2, 2).long(), expected), name
        numbers += expected.flatten().tolist()
    assert len(set(numbers)) > 4  # the policies differ here


def test_a_budget_of_every_key_is_dense_attention(make):
    case = make(2, 3, 64)
    found = attend(case, POLICIES["all keys"])
    output, lse = dense_decode(*case.layout, SCALE)
    torch.testing.assert_close(found.output, output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lse, lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.keys.long(), case.rows.lengths[:, None].expand(-1, 2))
    torch.testing.assert_close(found.coverage, torch.ones_like(lse))


def test_rows_of_a_sequence_and_windows(make):
    case = make(2, 2, 64, lengths=(200, 1213), queries=2, starts=(0, 150, 700, 1100))
    policy = POLICIES["a fixed number"]
    selection, found = select(case, policy), attend(case, policy)
    selection.validate(case.rows.lengths)
    taken = selection.indices
    assert bool(((taken >= case.rows.starts[:, None, None]) | (taken == -1)).all())
    output, lse, _ = selected_attention(*case.layout, selection, SCALE)
    torch.testing.assert_close(found.output, output, atol=1e-5, rtol=1e-5)
    # About the mass that is there.
    _, dense = dense_decode(*case.layout, SCALE)
    torch.testing.assert_close(lse, dense, atol=0.6, rtol=0)


def test_a_row_is_the_same_alone_and_in_padded_company(make):
    case, policy = make(1, 2, 64, (40, 128, 1213)), POLICIES["a fixed number"]
    rows = case.rows
    once, twice = attend(case, policy), attend(case, policy)
    filled = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    tables = torch.cat(
        (rows.block_tables, rows.block_tables.new_zeros(2, len(rows.block_tables[0])))
    )
    lengths, starts = torch.cat((rows.lengths, filled)), torch.cat((rows.starts, filled))
    query = torch.cat((case.query, torch.full_like(case.query[:2], torch.nan)))
    padded = attend(Case(query, case.cache, Rows(tables, lengths, starts)), policy)
    one = Case(case.query[2:], case.cache, rows.only(torch.tensor([2], device=DEVICE)))
    alone = attend(one, policy)
    for name in ("output", "lse", "own", "coverage", "keys"):
        expected = getattr(once, name)
        assert torch.equal(getattr(twice, name), expected)
        assert torch.equal(getattr(padded, name)[:3], expected)
        assert torch.equal(getattr(alone, name)[0], expected[2])


@pytest.mark.parametrize("lengths", [(1, 5), (40, 64, 127), (63, 128, 129)])
def test_short_rows_are_read_whole(make, lengths):
    case = make(1, 2, 32, lengths=lengths)
    selection = select(case, POLICIES["a fixed number"])
    for row, length in enumerate(lengths):
        assert selection.indices[row, 0, :length].tolist() == list(range(length))
    _, lse = dense_decode(*case.layout, SCALE)
    torch.testing.assert_close(attend(case, POLICIES["mass"]).lse, lse, atol=1e-5, rtol=1e-5)


def test_a_sample_tells_about_the_whole(make):
    """Estimates of the mass and of the output are near dense attention's, over many heads."""
    case = make(3, 4, 64, lengths=(2500, 1700), gain=0.5)
    found = attend(case, POLICIES["a fixed number"])
    output, dense = dense_decode(*case.layout, SCALE)
    assert float((found.lse - dense).mean().abs()) < 0.02
    assert float((found.lse - dense).abs().mean()) < 0.1
    truth = (found.own - dense).exp()
    assert float((found.coverage - truth).abs().mean()) < 0.02
    error = (found.output - output).norm(dim=-1)
    uniform = 1 / found.keys.float().mean().sqrt() * 8  # of values of variance 1 in 64 channels
    assert float(error.mean()) < 2 * float(uniform)


def test_plain_top_k_takes_the_greatest_shares(make):
    case = make(2, 2, 64)
    _, scratch, share = estimated(case, PLAIN)
    selection = select(case, PLAIN)
    selection.validate(case.rows.lengths)
    assert selection.log_weight is None
    stop = int(case.rows.recent_page[2]) * PAGE
    for head, number in enumerate(scratch.marks.view(3, 2)[2].tolist()):
        ranked = share[2, head, PLAIN.sinks : stop].topk(number).indices + PLAIN.sinks
        expected = set(ranked.tolist()) | set(range(PLAIN.sinks)) | set(range(stop, 1213))
        assert set(weights_by_key(selection, 2, head)) == expected


@triton.jit
def _of_eight_bits(words, by_word, by_byte, back, known: tl.constexpr):
    lane = tl.arange(0, 32)
    for half in tl.static_range(2):
        word = tl.load(words + half * 32 + lane)
        four = float8.of_word(word, known)
        for place in tl.static_range(4):
            target = (half * 32 + lane) * 4 + place
            tl.store(by_word + target, four[place])
            number = float8.of_byte(word >> 8 * place)
            tl.store(by_byte + target, number)
            tl.store(back + target, float8.to_byte(number, 448.0))


def test_numbers_of_eight_bits_are_torchs():
    every = torch.arange(256, device=DEVICE).to(torch.uint8)
    by_word, by_byte = torch.empty(2, 256, device=DEVICE)
    back = torch.empty_like(every)
    known = float8.known(every.device)
    _of_eight_bits[1,](every.view(torch.int32), by_word, by_byte, back, known=known, num_warps=1)
    expected = every.view(FLOAT8).float()
    assert torch.equal(by_word.nan_to_num(1e3), expected.nan_to_num(1e3))
    assert torch.equal(by_byte.nan_to_num(1e3), expected.nan_to_num(1e3))
    numbers = expected.isfinite() & (expected != 0)
    assert torch.equal(back[numbers], every[numbers])
    assert back.view(FLOAT8).float().isnan().equal(expected.isnan())


@pytest.mark.parametrize("spec", ["sinks:16+window:100", "window:3"])
def test_judges_agree(make, spec):
    case = make(2, 2, 64, lengths=(5, 100, 1213), gain=0.5)
    selection = Pattern.parse(spec).select(case.rows.lengths, case.rows.starts, 2)
    _, lse, own = selected_attention(*case.layout, selection, SCALE)
    estimated, exact = [], []
    for impl in (Impl.TORCH, Impl.TRITON):
        told = judge.estimated_coverage(*case.layout, selection, lse, own, SCALE, impl)
        estimated.append(told)
        exact.append(judge.true_coverage(*case.layout, selection, own, SCALE, impl))
    torch.testing.assert_close(*estimated, atol=0.02, rtol=0)
    torch.testing.assert_close(*exact, atol=1e-5, rtol=1e-4)


def test_keys_that_are_not_finite_show(make):
    case = make(1, 2, 32, lengths=(1213, 1150))
    page = int(case.rows.block_tables[0, 3])
    case.cache.kv[0, page, 5, 0] = torch.inf
    case.cache.code(torch.tensor([page], device=DEVICE))
    found = attend(case, POLICIES["a fixed number"])
    assert bool(found.coverage[0].isnan().any())
    assert bool(found.coverage[1].isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.bfloat16, -7e4)]
)  # of the second float16 has none, as which centres are scored
def test_a_query_that_is_not_finite_shows_and_draws_nothing(make, dtype, value):
    case = make(1, 2, 32, lengths=(1213, 1150), dtype=dtype)
    case.query[0, :, 3] = value
    found = attend(case, POLICIES["a fixed number"])
    assert bool(found.coverage[0].isnan().all())
    window = 1213 - (1213 // PAGE - 1) * PAGE
    assert int(found.keys[0, 0]) == window + 16
    assert bool(found.coverage[1].isfinite().all())
