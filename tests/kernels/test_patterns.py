"""Fixed patterns: one definition each, and everything else derived from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.errors import PatternError
from kernels.patterns import Pattern, Sinks, Strided, Window

SIZES = [*range(1, 65), 97, 129]
parts = st.one_of(*(st.builds(kind, st.integers(1, 80)) for kind in (Sinks, Window, Strided)))
patterns = st.builds(Pattern, st.lists(parts, min_size=1, max_size=4).map(tuple))

DEFINITIONS = {
    "sinks": lambda n, i, j: j < n,
    "window": lambda n, i, j: i - n < j,  # n keys, the query's own included
    "strided": lambda n, i, j: (i - j) % n == 0,
}


@pytest.mark.parametrize("name", list(DEFINITIONS))
@pytest.mark.parametrize("size", [1, 2, 3, 16, 63, 64, 200])
def test_a_primitive_is_its_definition(name, size):
    pattern = Pattern.parse(f"{name}:{size}")
    n = 130
    position = torch.arange(n)
    mask = pattern.allows(position[:, None], position)
    for i in range(n):
        expected = [j for j in range(i + 1) if DEFINITIONS[name](size, i, j)]
        assert mask[i].nonzero().flatten().tolist() == expected
    selection = pattern.select(position + 1, torch.zeros_like(position), 1)
    selection.validate(position + 1)
    for i in range(n):
        listed = selection.indices[i, 0, : selection.counts[i, 0]]
        assert listed.tolist() == mask[i].nonzero().flatten().tolist()


@given(patterns, st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(0, 400))
def test_selected_are_the_keys_that_allows_allows(pattern, positions, start):
    position = torch.tensor(positions)
    starts = position.clamp_max(start)
    selection = pattern.select(position + 1, starts, 2)
    selection.validate(position + 1)
    key = torch.arange(400)
    for row in range(len(positions)):
        allowed = pattern.allows(position[row], key) & (key >= starts[row])
        for head in range(2):
            listed = selection.indices[row, head, : selection.counts[row, head]]
            assert torch.equal(listed, allowed.nonzero().flatten())


@given(patterns)
def test_a_pattern_reads_back_what_it_prints(pattern):
    assert Pattern.parse(str(pattern)) == pattern


@given(patterns, patterns)
def test_a_union_allows_what_either_allows(left, right):
    position = torch.arange(70)
    query, key = position[:, None], position
    both = Pattern(left.parts + right.parts)
    assert torch.equal(both.allows(query, key), left.allows(query, key) | right.allows(query, key))


def test_selections_respect_lengths_and_starts():
    pattern = Pattern.parse("sinks:4 + window:10")
    lengths = torch.tensor([3, 100, 50])
    selection = pattern.select(lengths, torch.tensor([0, 0, 45]), 2)
    selection.validate(lengths)
    assert selection.counts[:, 0].tolist() == [3, 14, 5]
    assert selection.indices[2, 1, :5].tolist() == [45, 46, 47, 48, 49]


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("window:2", True),
        ("window:1", False),
        ("strided:64", False),
        ("strided:1", True),
        ("sinks:16+window:1024", True),
        ("sinks:16", False),
    ],
)
def test_a_pattern_knows_whether_it_keeps_the_previous_key(text, keeps):
    assert Pattern.parse(text).keeps_previous is keeps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "window",
        "window:",
        "window:0",
        "window:-3",
        "window:1.5",
        "windw:3",
        "+",
        "window:8+",
        "sinks:99999999999",
        "window:٣",
    ],
)
def test_what_cannot_be_read_is_named_with_the_accepted_form(text):
    with pytest.raises(PatternError, match=r"write a union of sinks:N"):
        Pattern.parse(text)
