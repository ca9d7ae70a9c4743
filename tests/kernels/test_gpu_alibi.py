"""Scores that fall with distance in Triton's kernels, against the reference and torch's ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import dynamic, judge
from kernels.attention import Impl, dense_attention, dense_decode, selected_attention
from kernels.cache import LayerCache, Rows, Segment
from kernels.gpu.decode import look_over
from kernels.gpu.prepare import LOG2E
from kernels.gpu.scan import scan
from kernels.masses import estimate_masses
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic
from kernels.prefill import choose, pattern_lists, tile_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.25
SHAPES = [(3, 1, 32), (1, 3, 64)]
"""KV heads, group, head dimension."""


pytestmark = pytest.mark.usefixtures("few_programs")


class Case:
    """Rows, and the last tokens of the first sequence, on the device under test."""

    def __init__(self, paged, lengths, kv_heads, group, head_dim, gain=1.0, dtype=torch.float32):
        case = paged(lengths, kv_heads, head_dim, dtype)
        heads = kv_heads * group
        slopes = torch.tensor([2.0 ** -(1 + 9 * head / heads) for head in range(heads)])
        parts = (part.to(DEVICE) for part in case.cache.parts)
        self.cache = LayerCache(*parts).biased(slopes.to(DEVICE))
        self.rows = Rows(*(x.to(DEVICE) for x in (
            case.rows.block_tables, case.rows.lengths, case.rows.starts
        )))  # fmt: skip
        self.query = (case.query(group) * gain).to(DEVICE)
        self.case, self.group, self.slopes = case, group, slopes

    def segment(self, start):
        """The first sequence's tokens from `start` on, and queries for them."""
        tokens = int(self.rows.lengths[0]) - start
        segment = Segment.of(self.case.tables[0], start, tokens, torch.device(DEVICE))
        return self.case.query(self.group, tokens).to(DEVICE), segment


def near(ours, theirs, tolerance=3e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_over_all_keys_and_over_some(paged, shape):
    one = Case(paged, [1, 70, 700], *shape)
    rest = (one.query, one.cache, one.rows)
    for ours, theirs in zip(
        dense_decode(*rest, SCALE, Impl.TRITON),
        dense_decode(*rest, SCALE, Impl.REFERENCE),
        strict=True,
    ):
        near(ours, theirs)
    pattern = Pattern.parse("sinks:4+strided:5")
    plain = pattern.select(one.rows.lengths, one.rows.starts, shape[0])
    weights = torch.rand(plain.indices.shape, generator=one.case.generator).to(DEVICE)
    for selection in (plain, replace(plain, log_weight=weights * (plain.indices >= 0))):
        for ours, theirs in zip(
            selected_attention(*rest, selection, SCALE, Impl.TRITON),
            selected_attention(*rest, selection, SCALE, Impl.REFERENCE),
            strict=True,
        ):
            near(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_keys_in_as_many_programs_as_there_are_blocks(paged, monkeypatch, shape):
    one = Case(paged, [65, 129, 700], *shape)
    monkeypatch.setattr("kernels.gpu.attend.RESIDENT", 1 << 10)
    rest = (one.query, one.cache, one.rows, SCALE)
    for ours, theirs in zip(
        dense_decode(*rest, Impl.TRITON), dense_decode(*rest, Impl.REFERENCE), strict=True
    ):
        near(ours, theirs)


def test_places_at_a_million_keys_are_told_apart(paged):
    one = Case(paged, [320], 2, 1, 32)
    behind = (1 << 20) - 320
    filled = one.rows.block_tables.new_zeros(1, behind // PAGE)
    rows = Rows(
        torch.cat((filled, one.rows.block_tables), dim=1),
        torch.tensor([1 << 20], device=DEVICE),
        torch.tensor([behind], device=DEVICE),
    )
    ours = dense_decode(one.query, one.cache, rows, SCALE, Impl.TRITON)
    theirs = dense_decode(one.query, one.cache, one.rows, SCALE, Impl.REFERENCE)
    near(ours[0], theirs[0])
    near(ours[1], theirs[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scan_estimates_what_torch_does(paged, shape):
    """But for the rounding of queries: shares by place and content."""
    one = Case(paged, [1300], *shape, gain=0.4)
    policy, rest = Dynamic(), (one.query, one.cache, one.rows)
    layout, scratch = look_over(*rest, policy, SCALE)
    share = torch.zeros(layout.lines, layout.pages * PAGE, device=DEVICE)
    scan(one.query, one.cache, one.rows, policy.sinks, SCALE, layout, scratch, shares=share)
    known = estimate_masses(*rest, policy.sinks, SCALE)
    norm = scratch.norm[:, : one.group].reshape(known.norm.shape) / LOG2E.value
    near(norm, known.norm, 0.1)
    expected = known.shares()  # [rows, kv_heads, keys]
    share = share.view(*expected.shape[:2], -1)[..., : expected.shape[-1]]
    held = expected > 1e-12
    assert held.any()
    assert (share[held].log() - expected[held].log()).abs().max() < 0.5
    # Without slopes they would be of another order.
    flat = estimate_masses(one.query, replace(one.cache, slopes=None), one.rows, 16, SCALE)
    other = flat.shares()
    assert (other[held].log() - expected[held].log()).abs().max() > 2


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        *((shape, torch.float32, 3e-5) for shape in SHAPES),
        ((1, 3, 64), torch.float16, 2e-3),
        ((1, 9, 128), torch.float16, 2e-3),
    ],
)
def test_a_selection_of_every_key_is_dense(paged, shape, dtype, tolerance):
    one = Case(paged, [1, 700], *shape, dtype=dtype)
    rest = (one.query, one.cache, one.rows)
    policy = Dynamic(coverage=1.0, min_keys=4000, max_keys=4000)
    found = dynamic.attend(*rest, policy, SCALE, impl=Impl.TRITON)
    output, lse = dense_decode(*rest, SCALE, Impl.REFERENCE)
    near(found.output, output, tolerance)
    near(found.lse, lse, tolerance)
    near(found.coverage, torch.ones_like(found.coverage), tolerance)


def test_a_sample_stands_for_all_and_its_coverage_is_known(paged):
    one = Case(paged, [1500], 3, 1, 64)
    rest = (one.query, one.cache, one.rows)
    found = dynamic.attend(*rest, Dynamic(min_keys=700, max_keys=700), SCALE, impl=Impl.TRITON)
    output, lse = dense_decode(*rest, SCALE, Impl.REFERENCE)
    assert (found.output - output).norm() <= 0.25 * output.norm()
    assert (found.lse - lse).abs().max() < 0.3
    pattern = Pattern.parse("sinks:4+window:30")
    selection = pattern.select(one.rows.lengths, one.rows.starts, 3)
    _, some, own = selected_attention(*rest, selection, SCALE, Impl.TRITON)
    estimate = judge.estimated_coverage(*rest, selection, some, own, SCALE, Impl.TRITON)
    assert (estimate - (some - lse).exp()).abs().max() < 0.05
    true = judge.true_coverage(*rest, selection, own, SCALE, Impl.TRITON)
    near(true, (some - lse).exp(), 1e-4)


PROMPTS = [([400], 250, 1, 3), ([431], 310, 2, 1)]


@pytest.mark.parametrize(("least", "likeness"), [(0.0, 1.0), (0.0025, 0.1), (0.1, 1.0)])
@pytest.mark.parametrize(("lengths", "start", "kv_heads", "group"), PROMPTS)
def test_tiles_are_the_references(paged, lengths, start, kv_heads, group, least, likeness):
    one = Case(paged, lengths, kv_heads, group, 32)
    query, segment = one.segment(start)
    query = query * likeness
    ours = choose(query, one.cache, segment, least, SCALE, Impl.TRITON)
    theirs = choose(query, one.cache, segment, least, SCALE, Impl.REFERENCE)
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.left, theirs.left)
    expected = tile_attention(query, one.cache, segment, theirs, SCALE, Impl.REFERENCE)
    actual = tile_attention(query, one.cache, segment, ours, SCALE, Impl.TRITON)
    for mine, other in zip(actual, expected, strict=True):
        near(mine, other)


@pytest.mark.parametrize(("lengths", "start", "kv_heads", "group"), PROMPTS)
def test_a_prompt_densely_and_by_a_pattern(paged, lengths, start, kv_heads, group):
    one = Case(paged, lengths, kv_heads, group, 32)
    query, segment = one.segment(start)
    for window in (None, 70):
        ours, theirs = (
            dense_attention(query, one.cache, segment, SCALE, window, impl)
            for impl in (Impl.TRITON, Impl.REFERENCE)
        )
        near(ours, theirs)
    lists, _ = pattern_lists(Pattern.parse("strided:7+window:9"), segment, kv_heads)
    ours, theirs = (
        tile_attention(query, one.cache, segment, lists, SCALE, impl)
        for impl in (Impl.TRITON, Impl.REFERENCE)
    )
    near(ours[0], theirs[0])
    near(ours[1], theirs[1])
