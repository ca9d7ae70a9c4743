"""Keys and links that are written out: against their definition, alone and composed."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.errors import PatternError
from kernels.patterns.expression import Intersection, Union
from kernels.patterns.links import Links
from kernels.patterns.pattern import Pattern
from kernels.patterns.spans import Spans
from kernels.patterns.window import Window


def drawn(count, most, seed=0):
    """Places, ascending."""
    return sorted(random.Random(seed).sample(range(most), count))


@pytest.mark.parametrize("n", [1, 64, 200, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_spans_are_their_keys(n, causal, listed):
    places = drawn(n // 3 + 1, n)
    pattern = Pattern(Spans.of(places), causal)
    expected = torch.zeros(n, n, dtype=torch.bool)
    expected[:, places] = True
    expected = expected.tril() if causal else expected
    assert torch.equal(pattern.mask(n, n), expected)
    assert torch.equal(listed(pattern, 0, n, n), expected)


@pytest.mark.parametrize("size", [1, 16, 24, 64, 96, 128])
@pytest.mark.parametrize("n", [1, 64, 200, 1000])
def test_links_are_their_blocks(size, n, listed):
    blocks = -(-n // size)
    generator = random.Random(size + n)
    rows = tuple(
        tuple(generator.sample(range(blocks), generator.randint(0, min(blocks, 5))))
        for _ in range(blocks)
    )
    pattern = Pattern(Links(size, rows), causal=False)
    expected = torch.tensor(
        [[j // size in rows[i // size] for j in range(n)] for i in range(n)]
    ).view(n, n)
    assert torch.equal(pattern.mask(n, n), expected)
    assert torch.equal(listed(pattern, 0, n, n), expected)


@pytest.mark.parametrize("size", [16, 64])
def test_they_compose(size, listed):
    n = 700
    spans, mask = Spans.of([0, 100, 101, 650]), Spans.of(drawn(500, n))
    links = Links(size, tuple((row, row // 2) for row in range(-(-n // size))))
    for expression in (
        Union((Window(100), spans)),
        Intersection((Union((Window(100), spans)), mask)),
        Intersection((links, mask)),
        Union((links, spans)),
    ):
        pattern = Pattern(expression, causal=False)
        assert torch.equal(listed(pattern, 0, n, n), pattern.mask(n, n))
        pattern.tiles(0, n, n, "cpu").validate(0, n, n, causal=False)
    rows = Pattern(Union((links, spans)), causal=True).mask(n, n)
    assert not rows.triu(1).any()


def test_decode_rows_select_them():
    spans = Spans(((2, 4), (70, 75)))
    lengths = torch.tensor([1, 3, 73, 200])
    found = Pattern(Union((Window(2), spans))).select(lengths, lengths * 0, 1)
    keys = [row[0, :count].tolist() for row, count in zip(found.indices, found.counts, strict=True)]
    assert keys == [[0], [1, 2], [2, 3, 70, 71, 72], [2, 3, *range(70, 75), 198, 199]]


@pytest.mark.parametrize("edges", [(), ((3, 3),), ((0, 4), (4, 5)), ((5, 9), (1, 2)), ((-1, 2),)])
def test_stretches_that_are_none(edges):
    with pytest.raises(PatternError, match="ascend and be apart"):
        Spans(edges)


def test_blocks_that_are_none():
    with pytest.raises(PatternError, match="size of at least 1"):
        Links(0, ())
    with pytest.raises(PatternError, match="from 0 on"):
        Links(16, ((-1,),))
