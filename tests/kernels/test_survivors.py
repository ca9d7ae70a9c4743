"""Which pages' codes are read: the specification's, and as many as are stood for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference_sample
from kernels.budget import FAR
from kernels.sample import SEGMENT
from kernels.survivors import READ, STRATA, STRATUM, SURE, draws, share_read, survivors


def some_scores(seed, rows, kv_heads, pages):
    """With ties, and pages of which no key is free."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, kv_heads, pages, generator=generator).mul(4).round()
    return score.masked_fill(torch.rand(score.shape, generator=generator) < 0.1, -torch.inf)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    pages=st.integers(1, 3 * SEGMENT + 5),
    first=st.integers(0, 3),
    far=st.booleans(),
)
def test_they_are_the_references(seed, pages, first, far):
    score = some_scores(seed, 2, 2, pages)
    lengths = torch.tensor([FAR + 500 + seed, FAR + 17])
    visible = lengths if far else torch.full_like(lengths, FAR - 1)
    found = survivors(score, first * SEGMENT, lengths, visible, torch.zeros(2, 2).bool())
    number = draws(first, -(-pages // SEGMENT), lengths, 2)
    for row in range(2):
        for head in range(2):
            for segment, start in enumerate(range(0, pages, SEGMENT)):
                part = score[row, head, start : start + SEGMENT].tolist()
                room = SEGMENT - len(part)
                expected = reference_sample.survivors(
                    [*part, *[float("-inf")] * room],
                    int(visible[row]),
                    number[row, head, segment].tolist(),
                    SURE,
                    STRATUM,
                    FAR,
                )
                own = found[row, head, start : start + SEGMENT].tolist()
                assert own == expected[: len(part)]


def test_each_page_is_stood_for_once_over_many_tokens():
    """So sums over the pages read, with what they stand for, are right on average."""
    count = 4096
    score = some_scores(1, 1, 2, 4 * SEGMENT).expand(count, -1, -1)
    lengths = torch.arange(count) + FAR
    found = survivors(score, 0, lengths, lengths, torch.zeros(count, 2).bool())
    mean = found.float().mean(0)
    assert float((mean - 1).abs().max()) < 0.03
    read = found.view(count, 2, 4, SEGMENT) > 0
    assert bool((read.sum(-1) == READ).all())
    # One token after the other, and none is left out for long.
    gaps = read.flatten(1).int().cumsum(0)
    assert int((gaps[12:] - gaps[:-12]).min()) > 0


def test_digits_are_independent_of_each_other():
    found = draws(0, 64, torch.arange(1000), 2).flatten(0, 2)
    assert found.shape == (64 * 2000, STRATA) and set(found.flatten().tolist()) == {0, 1, 2}
    both = torch.bincount(found[:, 0] * STRATUM + found[:, 1]) / len(found)
    assert float((both - 1 / STRATUM**2).abs().max()) < 0.005


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_read(value):
    score = torch.zeros(1, 1, SEGMENT)
    score[..., 13] = value
    found = survivors(
        score, 0, torch.tensor([FAR]), torch.tensor([FAR]), torch.zeros(1, 1, dtype=torch.bool)
    )
    assert int(found[..., 13]) == 1


def test_rows_that_read_everything_read_every_page():
    score, far = some_scores(3, 2, 1, 20), torch.tensor([FAR, FAR])
    found = survivors(score, 0, far, far, torch.tensor([[True], [False]]))
    assert bool((found[0] == 1).all()) and int(found[1].max()) == STRATUM
    assert (share_read(FAR), share_read(FAR - 1)) == (READ / SEGMENT, 1.0)
