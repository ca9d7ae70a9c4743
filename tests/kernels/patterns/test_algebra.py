"""Unions and intersections: their laws, and everything that is derived from `allows`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import PatternError
from kernels.patterns.expression import Intersection, Union
from kernels.patterns.pattern import Pattern
from kernels.patterns.sinks import Sinks
from kernels.patterns.window import Window

some = settings(deadline=None, max_examples=60)
N = 200


def pair(data, patterns):
    left, right = data.draw(patterns), data.draw(patterns)
    return left, replace(right, causal=left.causal)


@some
@given(st.data())
def test_a_union_allows_what_either_allows_and_an_intersection_what_both(patterns, data):
    left, right = pair(data, patterns)
    one, two = left.mask(N, N), right.mask(N, N)
    assert torch.equal((left + right).mask(N, N), one | two)
    assert torch.equal((left & right).mask(N, N), one & two)


@some
@given(st.data())
def test_laws_of_the_algebra(patterns, data):
    left, right = pair(data, patterns)
    third = replace(data.draw(patterns), causal=left.causal)
    assert (left + right) + third == left + (right + third)
    assert (left & right) & third == left & (right & third)
    for one, other in (
        (left + right, right + left),
        (left & right, right & left),
        (left + left, left),
        (left & left, left),
        (left & (right + third), (left & right) + (left & third)),
        (left + (right & third), (left + right) & (left + third)),
        (left + (left & right), left),
        (left & (left + right), left),
    ):
        assert torch.equal(one.mask(N, N), other.mask(N, N))


@some
@given(st.data())
def test_a_pattern_reads_back_what_it_prints(patterns, data):
    left, right = pair(data, patterns)
    for pattern in (left, left + right, left & right):
        if len(str(pattern)) <= 256:
            assert Pattern.parse(str(pattern)) == pattern
            assert hash(Pattern.parse(str(pattern))) == hash(pattern)


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_tiles_list_what_allows_allows(patterns, listed, data):
    pattern = data.draw(patterns)
    first = 64 * data.draw(st.integers(0, 6))
    queries = data.draw(st.integers(1, 700))
    keys = data.draw(st.one_of(st.just(first + queries), st.integers(1, first + queries + 200)))
    found = listed(pattern, first, queries, keys)
    assert torch.equal(found, pattern.mask(queries, keys, first))


@some
@given(st.data())
def test_selected_are_the_keys_that_allows_allows(patterns, data):
    pattern = data.draw(patterns)
    position = torch.tensor(data.draw(st.lists(st.integers(0, 600), min_size=1, max_size=4)))
    starts = position.clamp_max(data.draw(st.integers(0, 700)))
    selection = pattern.select(position + 1, starts, 2)
    selection.validate(position + 1)
    key = torch.arange(601)
    for row in range(len(position)):
        allowed = pattern.allows(position[row], key) & (key >= starts[row]) & (key <= position[row])
        for head in range(2):
            found = selection.indices[row, head, : selection.counts[row, head]]
            assert torch.equal(found, allowed.nonzero().flatten())


@some
@given(st.data())
def test_pairs_are_counted_without_a_mask(patterns, data):
    pattern, n = data.draw(patterns), data.draw(st.integers(0, 400))
    mask = pattern.mask(n, n)
    assert pattern.selected_keys(n) == int(mask.sum())
    dense = int(Pattern.parse("full@bidirectional").mask(n, n).tril().sum())
    dense = dense if pattern.causal else n * n
    assert pattern.sparsity(n) == pytest.approx(1 - int(mask.sum()) / dense if n else 0)


@some
@given(st.data())
def test_a_pattern_that_keeps_the_previous_key_does_so_everywhere(patterns, data):
    pattern = data.draw(patterns)
    query = torch.cat((torch.arange(1, 3000), torch.arange(10**9, 10**9 + 3000)))
    if pattern.keeps_previous:
        assert pattern.allows(query, query - 1).all()


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        *(("full", True), ("window:2", True), ("window:1", False)),
        *(("dilated:3,1", True), ("dilated:3,2", False), ("strided:1", True)),
        *(("strided:64", False), ("fixed:8,1", True), ("block_local:64", False)),
        *(("axial:8,8", False), ("axial:8,1", False), ("random:3,0", False)),
        *(("global:100", False), ("sinks:16", False), ("sinks:16+window:1024", True)),
        *(("window:2&fixed:8,1", True), ("window:2&block_local:8", False)),
        ("block_local:8+block_local:12", False),  # neither shows query 24 the key before it
        *(("mistral", True), ("streaming", True), ("longformer", True), ("bigbird", True)),
        *(("sparse-transformer-strided", True), ("sparse-transformer-fixed", True)),
    ],
)
def test_a_pattern_knows_whether_it_keeps_the_previous_key(text, keeps):
    assert Pattern.parse(text).keeps_previous is keeps


def test_equal_operators_dissolve_and_others_do_not():
    window, sinks = Window(8), Sinks(2)
    assert Union((window, Union((sinks, window)))).parts == (window, sinks, window)
    mixed = Intersection((window, Union((sinks, window))))
    assert str(mixed) == "window:8&(sinks:2+window:8)"
    assert str(Union((mixed, sinks))) == "window:8&(sinks:2+window:8)+sinks:2"
    for kind in (Union, Intersection):
        with pytest.raises(PatternError, match="needs two"):
            kind((window,))


def test_causal_and_bidirectional_patterns_do_not_mix():
    for operator in (Pattern.__add__, Pattern.__and__):
        with pytest.raises(PatternError, match="one is causal and one bidirectional"):
            operator(Pattern.parse("window:8"), Pattern.parse("window:8@bidirectional"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("full", "O(n^2)"), ("window:9", "O(n w)"), ("dilated:9,2", "O(n w)")),
        *(("global:2", "O(n g)"), ("sinks:2", "O(n s)"), ("block_local:2", "O(n b)")),
        *(("random:3,0", "O(n r)"), ("strided:8", "O(n sqrt n)"), ("fixed:8,2", "O(n sqrt n)")),
        *(("axial:8,8", "O(n sqrt n)"), ("longformer", "O(n (g + w))")),
        *(("bigbird", "O(n (g + w + r))"), ("window:8+strided:8", "O(n sqrt n)")),
        *(("window:8+full", "O(n^2)"), ("full&window:8", "O(n w)")),
        *(("window:8&block_local:4", "O(n b)"), ("(full+sinks:2)&strided:4", "O(n sqrt n)")),
        ("random:1,0&window:65+window:8", "O(n (r + w))"),
    ],
)
def test_complexity_names_what_grows_fastest(text, expected):
    assert Pattern.parse(text).complexity == expected
