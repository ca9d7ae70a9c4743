"""Decode rows of long prompts: the right keys, and work for these alone."""

from __future__ import annotations

import pytest
import torch

from kernels.patterns.parse import DEPTH
from kernels.patterns.pattern import Pattern
from kernels.patterns.sinks import Sinks
from kernels.patterns.strided import Strided
from kernels.patterns.view import View

MILLION = 1 << 20
CASES = {  # the keys that a query at the end of a million sees, or would see of later ones
    "sinks:16+window:1024": 1040,
    "window:512+strided:1024": 1536,
    "window:1000000&strided:1000": 1000,
    "strided:64&(window:4096+sinks:64)": 65,
    "(global:1+window:512)&strided:8": 65,
    "full&window:64": 64,
    "dilated:64,1000": 64,
    "axial:1024,1024": 2047,
    "block_local:1000": 1000,
    "fixed:4096,8": 4096 + 255 * 8,
    "random:3,0+window:64": 256,
    "random:1000,0&window:4096": 4096,
    "longformer": 514,
    "bigbird": 128 + 193 + 192,
    "strided:1000&fixed:1000,10": 1048,
}


@pytest.mark.parametrize("text", CASES)
def test_a_row_of_a_long_prompt(text):
    pattern = Pattern.parse(text)
    lengths = torch.tensor([MILLION, MILLION - 12_345, 5000])
    starts = torch.tensor([0, 1000, 4990])
    selection = pattern.select(lengths, starts, 3)
    selection.validate(lengths)
    assert selection.indices.stride(1) == selection.counts.stride(1) == 0
    key = torch.arange(MILLION)
    for row in range(3):
        inside = (key >= starts[row]) & (key < lengths[row])
        expected = (pattern.allows(lengths[row] - 1, key) & inside).nonzero().flatten()
        assert torch.equal(selection.indices[row, 1, : selection.counts[row, 1]], expected)


@pytest.mark.parametrize("text", CASES)
def test_few_more_keys_are_listed_than_are_seen(text):
    pattern = Pattern.parse(text)
    query = torch.tensor([[MILLION - 1]])
    view = View(
        first=query,
        low=torch.zeros_like(query),
        high=query,
        size=1,
        span=MILLION,
        earliest=MILLION - 1,
        latest=MILLION - 1,
        causal=pattern.causal,
    )
    assert pattern.expression.cover(view).columns <= 1.2 * CASES[text] + 64


def test_no_more_keys_are_asked_about_than_there_are(monkeypatch):
    asked = []
    allows = Pattern.allows
    monkeypatch.setattr(
        Pattern, "allows", lambda self, q, k: asked.append(k.shape) or allows(self, q, k)
    )
    many = Pattern.parse("+".join(["full", "strided:2", "global:50", "window:900"] * 4))
    selection = many.select(torch.tensor([1000, 700]), torch.tensor([0, 100]), 1)
    assert asked == [(2, 1000)]
    assert selection.counts.tolist() == [[1000], [600]]


def test_selections_respect_lengths_and_starts():
    pattern = Pattern.parse("sinks:4 + window:10")
    lengths = torch.tensor([3, 100, 50])
    selection = pattern.select(lengths, torch.tensor([0, 0, 45]), 2)
    selection.validate(lengths)
    assert selection.counts[:, 0].tolist() == [3, 14, 5]
    assert selection.indices[2, 1, :5].tolist() == [45, 46, 47, 48, 49]
    nothing = Pattern.parse("sinks:4").select(lengths, torch.tensor([3, 100, 50]), 2)
    assert nothing.counts.tolist() == [[0, 0]] * 3


def test_a_part_is_asked_once_a_view_however_deep_it_lies(monkeypatch):
    asked = []
    for kind in (Strided, Sinks):

        def runs(self, view, runs=kind.runs):
            asked.append(self)
            assert len(asked) < 1000
            return runs(self, view)

        monkeypatch.setattr(kind, "runs", runs)
    pattern, sinks, full = map(Pattern.parse, ("strided:999", "sinks:1", "full"))
    for _ in range(DEPTH):
        pattern = (pattern + sinks) & full
    selection = pattern.select(torch.tensor([4096]), torch.tensor([0]), 1)
    assert selection.counts.tolist() == [[6]]
    plain = Pattern.parse("strided:999+sinks:1").tiles(4096, 64, 4160, "cpu")
    assert torch.equal(pattern.tiles(4096, 64, 4160, "cpu").pages, plain.pages)
    assert asked


def test_no_more_keys_are_listed_than_there_are(monkeypatch):
    pattern = Pattern.parse("+".join(f"random:99999,{seed}" for seed in range(15)))
    listed, allows = [], Pattern.allows

    def watched(self, query, key):
        listed.append(key.numel())
        return allows(self, query, key)

    monkeypatch.setattr(Pattern, "allows", watched)
    lengths = torch.tensor([2048, 8192])
    selection = pattern.select(lengths, lengths - 1024, 1)
    assert listed == [2 * 1024]
    selection.validate(lengths)
    assert selection.counts.tolist() == [[1024 - 64]] * 2  # all but the query's own block
    assert selection.indices[1, 0, 0] == 8192 - 1024
