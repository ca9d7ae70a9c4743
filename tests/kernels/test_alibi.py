"""Scores that fall with distance, in every op and backend, against a softmax written down."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kernels import dynamic, judge
from kernels.alibi import page_evenness, page_mass
from kernels.attention import Impl, dense_attention, dense_decode, selected_attention
from kernels.cache import Rows, Segment
from kernels.codes import rotation
from kernels.errors import KernelError
from kernels.masses import estimate_masses
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic
from kernels.prefill import choose, pattern_lists, tile_attention
from kernels.selection import Selection
from kernels.softmax import wide

SCALE = 0.25
IMPLS = [Impl.REFERENCE, Impl.TORCH, Impl.NUMBA]
SHAPES = [(1, 1), (4, 1), (2, 3)]  # (kv_heads, group)
LENGTHS = [1, 64, 300, 4000]


def slopes_of(heads):
    """From next to nothing to steep, no two alike."""
    return torch.tensor([2.0 ** -(1 + 9 * head / heads) for head in range(heads)])


def biased(case, group):
    slopes = slopes_of(case.kv_heads * group)
    case.cache = case.cache.biased(slopes.to(wide(case.dtype)))
    return case


def exact(case, query, row, mask=None):
    """Weights [heads, keys] and output [heads, d] of one decode row, and log-sum-exp [heads]."""
    sequence, length = row // case.rows.queries, int(case.rows.lengths[row])
    group = query.shape[1] // case.kv_heads
    keys, values = (
        part[sequence][:length].double().repeat_interleave(group, dim=1).transpose(0, 1)
        for part in (case.keys, case.values)
    )  # [heads, keys, d]
    scores = torch.einsum("hd,hkd->hk", query[row].double() * SCALE, keys)
    scores -= slopes_of(len(keys)).double()[:, None] * (length - 1 - torch.arange(length))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return weights, torch.einsum("hk,hkd->hd", weights, values), scores.logsumexp(-1)


def close(actual, expected, dtype=torch.float32):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kv_heads", "group"), SHAPES)
def test_rows_over_all_keys_and_over_some(paged, kv_heads, group, impl, dtype):
    case = biased(paged(LENGTHS, kv_heads, 16, dtype), group)
    query = case.query(group)
    output, lse = dense_decode(query, case.cache, case.rows, SCALE, impl)
    width = max(LENGTHS)
    chosen = torch.rand(len(LENGTHS), kv_heads, width, generator=case.generator) < 0.3
    chosen &= torch.arange(width) < case.rows.lengths[:, None, None]
    chosen[:, :, 0] = True
    selection = Selection.from_mask(chosen, torch.arange(width))
    some, some_lse, own = selected_attention(query, case.cache, case.rows, selection, SCALE, impl)
    for row, length in enumerate(LENGTHS):
        _, expected, mass = exact(case, query, row)
        close(output[row], expected, dtype)
        close(lse[row], mass, dtype)
        mask = chosen[row, :, :length].repeat_interleave(group, dim=0)
        _, expected, mass = exact(case, query, row, mask)
        close(some[row], expected, dtype)
        close(some_lse[row], mass, dtype)
        assert torch.equal(some_lse, own)


@pytest.mark.parametrize("window", [None, 70, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kv_heads", "group"), SHAPES)
@pytest.mark.parametrize(("length", "start"), [(1, 0), (300, 0), (601, 150), (4000, 3100)])
def test_consecutive_tokens(paged, length, start, kv_heads, group, dtype, window):
    case = biased(paged([length], kv_heads, 16, dtype), group)
    tokens = length - start
    query = case.query(group, tokens)
    segment = Segment.of(case.tables[0], start, tokens, query.device)
    output = dense_attention(query, case.cache, segment, SCALE, window)
    for token in {0, tokens // 2, tokens - 1}:
        end = start + token + 1
        case.rows = Rows(case.rows.block_tables, torch.tensor([end]), torch.tensor([0]))
        mask = torch.arange(end) >= end - (window or end)
        _, expected, _ = exact(case, query[token][None], 0, mask)
        close(output[token], expected, dtype)


def test_the_reference_agrees(paged):
    case = biased(paged([200], 2, 16), 3)
    query = case.query(3, 120)
    segment = Segment.of(case.tables[0], 80, 120, query.device)
    for window in (None, 70):
        one, two = (
            dense_attention(query, case.cache, segment, SCALE, window, impl)
            for impl in (Impl.REFERENCE, Impl.TORCH)
        )
        torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_places_at_a_million_keys_are_told_apart(paged, impl):
    """The last keys of a sequence of 2 ** 20: slope * j alone would be rounded to 1 / 32."""
    case = biased(paged([640], 2, 16), 1)
    query, behind = case.query(1), (1 << 20) - 640
    table = [0] * (behind // PAGE) + case.tables[0]
    rows = Rows(torch.tensor([table]), torch.tensor([1 << 20]), torch.tensor([behind]))
    _, expected, mass = exact(case, query, 0)
    output, lse = dense_decode(query, case.cache, rows, SCALE, impl)
    close(output[0], expected)
    close(lse[0], mass)
    every = torch.arange(behind, 1 << 20).expand(1, 2, -1)
    selection = Selection(every, torch.full((1, 2), 640))
    output, lse, _ = selected_attention(query, case.cache, rows, selection, SCALE, impl)
    close(output[0], expected)
    close(lse[0], mass)


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
@pytest.mark.parametrize(("kv_heads", "group"), SHAPES)
def test_a_selection_of_every_key_is_dense(paged, kv_heads, group, impl):
    case = biased(paged(LENGTHS, kv_heads, 32), group)
    query = case.query(group)
    policy = Dynamic(coverage=1.0, min_keys=4000, max_keys=4000)
    found = dynamic.attend(query, case.cache, case.rows, policy, SCALE, impl=impl)
    assert torch.equal(found.keys, case.rows.lengths[:, None].expand(-1, kv_heads))
    for row in range(len(LENGTHS)):
        close(found.output[row], exact(case, query, row)[1])
    close(found.coverage, torch.ones_like(found.coverage).double())


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
def test_what_top_k_covers_is_near_the_most_and_known(paged, impl):
    case = biased(paged([4000], 4, 64, queries=4), 1)
    query = case.query(1)
    policy = Dynamic(coverage=0.99, min_keys=600, max_keys=600, sampled=False)
    selection = dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
    selection.validate(case.rows.lengths)
    rest = (query, case.cache, case.rows, selection)
    _, lse, own = selected_attention(*rest, SCALE, impl)
    estimated = judge.estimated_coverage(*rest, lse, own, SCALE, impl)
    true = judge.true_coverage(*rest, own, SCALE, impl)
    for row in range(4):
        weights, _, _ = exact(case, query, row)
        for head in range(4):
            keys = selection.indices[row, head]
            covered = weights[head, keys[keys >= 0]].sum()
            best = weights[head].sort(descending=True).values[: int((keys >= 0).sum())].sum()
            assert abs(true[row, head] - covered) < 1e-4
            assert abs(estimated[row, head] - covered) < 0.05
            assert covered > 0.8 * best


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.NUMBA])
def test_a_sample_stands_for_all(paged, impl):
    case = biased(paged([4000], 4, 64, queries=4), 1)
    query = case.query(1)
    policy = Dynamic(coverage=0.99, min_keys=900, max_keys=900)
    found = dynamic.attend(query, case.cache, case.rows, policy, SCALE, impl=impl)
    for row in range(4):
        _, expected, mass = exact(case, query, row)
        assert (found.output[row].double() - expected).norm() <= 0.25 * expected.norm()
        assert (found.lse[row] - mass).abs().max() < 0.3


def test_estimated_scores_fall_by_the_exact_distance(paged):
    case = paged([700, 4000], 2, 64, queries=2)
    query = case.query(2)
    plain = estimate_masses(query, case.cache, case.rows, 16, SCALE)
    steep = estimate_masses(query, biased(case, 2).cache, case.rows, 16, SCALE)
    position = torch.arange(steep.scores.shape[-1]) + steep.first
    fall = slopes_of(4).view(2, 2, 1) * (position - case.rows.lengths[:, None] + 1)[:, None, None]
    free = steep.free[:, None, None].expand(steep.scores.shape)
    torch.testing.assert_close(
        steep.scores[free], (plain.scores + fall)[free], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("kv_heads", "group"), SHAPES)
def test_numba_draws_what_torch_does(paged, kv_heads, group):
    case = biased(paged([700, 4000], kv_heads, 64, queries=2), group)
    # Queries that the scan need not round: rotated, they stand on its sixteen levels.
    levels = torch.randint(0, 16, (4, kv_heads * group, 64), generator=case.generator)
    levels[..., 0] = 15
    turned = rotation(64, torch.float32, torch.device("cpu"))
    query = (levels - 7.5) * 0.175 @ turned.T
    policy = Dynamic(coverage=0.9, min_keys=300, max_keys=1200)
    one, two = (
        dynamic.select(query, case.cache, case.rows, policy, SCALE, impl=impl)
        for impl in (Impl.NUMBA, Impl.TORCH)
    )
    for row in range(4):
        for head in range(kv_heads):
            first, second = (set(x.indices[row, head].tolist()) - {-1} for x in (one, two))
            assert len(first ^ second) <= 6  # lengths that round to the other side of a mark
            assert len(second) < 1500 or int(case.rows.lengths[row]) == len(second)


def test_a_patterns_coverage(paged):
    case = biased(paged([900], 2, 64), 2)
    query = case.query(2)
    selection = Pattern.parse("sinks:4+window:30").select(case.rows.lengths, case.rows.starts, 2)
    seen = selection.indices[0, 0]
    weights, _, _ = exact(case, query, 0)
    for impl in (Impl.TORCH, Impl.NUMBA):
        rest = (query, case.cache, case.rows, selection)
        _, lse, own = selected_attention(*rest, SCALE, impl)
        estimate = judge.estimated_coverage(*rest, lse, own, SCALE, impl)
        assert (estimate[0] - weights[:, seen].sum(-1)).abs().max() < 0.05


class Prompt:
    """The last tokens of a sequence, as tiles."""

    def __init__(self, paged, length, start, kv_heads, group, head_dim=32):
        self.case = biased(paged([length], kv_heads, head_dim), group)
        self.cache, self.tokens, self.start = self.case.cache, length - start, start
        self.query = self.case.query(group, self.tokens)
        device = self.query.device
        self.segment = Segment.of(self.case.tables[0], start, self.tokens, device)

    def choose(self, impl, least):
        return choose(self.query, self.cache, self.segment, least, SCALE, impl)

    def attend(self, selection, impl):
        return tile_attention(self.query, self.cache, self.segment, selection, SCALE, impl)


PROMPTS = [(301, 0, 2, 3), (500, 320, 4, 1), (431, 150, 1, 4)]


@pytest.mark.parametrize("shape", PROMPTS)
@pytest.mark.parametrize("least", [0.0, 0.0025, 0.1])
@pytest.mark.parametrize("likeness", [0.1, 1.0])
def test_tiles_are_the_references(paged, shape, least, likeness):
    """Also where a query finds a page's keys alike, so that some stand for all of them."""
    one = Prompt(paged, *shape)
    one.query *= likeness
    ours, theirs = one.choose(Impl.TORCH, least), one.choose(Impl.REFERENCE, least)
    assert torch.equal(ours.pages, theirs.pages) and torch.equal(ours.left, theirs.left)
    expected = one.attend(ours, Impl.REFERENCE)
    for mine, other in zip(one.attend(ours, Impl.TORCH), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("text", ["full", "window:100", "strided:7+window:9", "fixed:16,3"])
@pytest.mark.parametrize("shape", PROMPTS)
def test_tiles_by_patterns(paged, text, shape):
    one, pattern = Prompt(paged, *shape), Pattern.parse(text)
    lists, _ = pattern_lists(pattern, one.segment, one.cache.kv_heads)
    output, lse, _ = one.attend(lists, Impl.TORCH)
    for token in (0, one.tokens // 2, one.tokens - 1):
        end = one.start + token + 1
        rows = one.case.rows
        one.case.rows = Rows(rows.block_tables, torch.tensor([end]), torch.tensor([0]))
        mask = pattern.mask(1, end, end - 1)[0]
        _, expected, mass = exact(one.case, one.query[token][None], 0, mask)
        close(output[token], expected)
        close(lse[token], mass)


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_unread_pages_are_worth_what_their_keys_are(paged, impl):
    """All keys alike: then pages' masses are exact, and what steep heads lose is bounded."""
    one = Prompt(paged, 1216, 1088, 4, 1)
    keys = one.case.keys[0][:1].expand(1216, -1, -1)
    position = torch.arange(1216)
    slots = one.segment.block_table[position // PAGE] * PAGE + position % PAGE
    one.cache.write(slots, keys, one.case.values[0])
    one.cache.code(one.segment.block_table)
    selection = one.choose(impl, 0.0025)
    assert selection.left.any()
    output, lse, _ = one.attend(selection, impl)
    dense = dense_attention(one.query, one.cache, one.segment, SCALE)
    every, lse_of_all, _ = one.attend(one.choose(impl, 0.0), impl)
    torch.testing.assert_close(every, dense, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, lse_of_all, rtol=2e-5, atol=2e-5)
    assert (output - dense).norm(dim=-1).max() < 0.05 * 32**0.5


def test_steep_heads_read_what_is_near_whole(paged):
    """There a page's keys do not weigh alike, and no mean stands for them."""
    one = Prompt(paged, 1216, 1088, 4, 1)
    one.cache.key_mean.zero_(), one.cache.spread.zero_()
    one.query.zero_()  # all keys are alike, so that without slopes means would do
    flat = replace(one.cache, slopes=None)
    plain = choose(one.query, flat, one.segment, 1e-4, SCALE)
    steep = one.choose(Impl.TORCH, 1e-4)
    assert (plain.counts == 3).all()  # the first page, the one before, its own
    assert bool((steep.counts[:, -2] > 3).all())


def test_a_slope_of_nothing_is_no_slope():
    none = torch.zeros(1)
    assert math.isclose(float(page_mass(none)), math.log(PAGE), rel_tol=1e-6)
    assert math.isclose(float(page_evenness(none)), 1.0, rel_tol=1e-6)
    assert float(page_evenness(torch.full((1,), 50.0))) == pytest.approx(1 / PAGE)


def test_what_cannot_be_is_refused(paged):
    case = biased(paged([100], 2, 16), 2)
    query = case.query(2)
    with pytest.raises(KernelError, match="slopes"):
        dense_decode(query[:, :2], case.cache, case.rows, SCALE)
