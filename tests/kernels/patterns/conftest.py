"""Oracles: what each primitive means, in plain Python, and what lists of pages hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st

from kernels.page import PAGE
from kernels.patterns.pattern import Pattern


def mixed(word):
    """The hash's mixing step on a Python integer."""
    word = (word ^ word >> 16) * 0x21F0AAAD % 2**32
    word = (word ^ word >> 15) * 0x735A2D97 % 2**32
    return word ^ word >> 15


def drawn(count, seed, block, causal):
    """The blocks that a block draws among those before it."""
    key = mixed(mixed(seed) ^ block)
    if not causal:
        count = (count + (mixed(key ^ 0xFFFFFFFF) & 1)) // 2
    parts = min(count, block)
    edges = [part * block // parts for part in range(parts)] + [block]
    return {
        low + mixed(key ^ part) % (high - low)
        for part, (low, high) in enumerate(pairwise(edges))
        if parts
    }


def random_sees(causal, i, j, count, seed):
    late, early = max(i, j) // PAGE, min(i, j) // PAGE
    return early < late and early in drawn(count, seed, late, causal)


DEFINITIONS = {
    "full": lambda causal, i, j: True,
    "window": lambda causal, i, j, w: i - w < j if causal else abs(i - j) <= w // 2,
    "dilated": lambda causal, i, j, w, d: (
        i - j in range(0, w * d, d) if causal else abs(i - j) in range(0, w // 2 * d + 1, d)
    ),
    "global": lambda causal, i, j, g: i < g or j < g,
    "strided": lambda causal, i, j, s: (i - j) % s == 0,
    "fixed": lambda causal, i, j, b, c: (
        i // b == j // b or (j % b in range(b - c, b) and (j // b < i // b or not causal))
    ),
    "block_local": lambda causal, i, j, b: i // b == j // b,
    "axial": lambda causal, i, j, rows, cols: (
        i // (rows * cols) == j // (rows * cols)
        and (i // cols % rows == j // cols % rows or i % cols == j % cols)
    ),
    "random": random_sees,
    "sinks": lambda causal, i, j, s: j < s,
}


def sees(text):
    """Whether position i sees position j by a single primitive, spelled as in a pattern."""
    spelling, _, kind = text.partition("@")
    name, _, numbers = spelling.partition(":")
    numbers = [int(number) for number in numbers.split(",") if number]
    causal = not kind
    return lambda i, j: (j <= i or not causal) and DEFINITIONS[name](causal, i, j, *numbers)


@pytest.fixture(scope="session")
def by_definition():
    """bool [n, n], what a primitive's definition says."""

    def mask(text, n):
        rule = sees(text)
        return torch.tensor([[rule(i, j) for j in range(n)] for i in range(n)]).view(n, n)

    return mask


@pytest.fixture(scope="session")
def listed():
    """bool [queries, keys], the pairs in the lists of a pattern's tiles, which are as promised."""

    def mask(pattern, first, queries, keys):
        tiles = pattern.tiles(first, queries, keys, "cpu")
        tiles.validate(first, queries, keys, causal=pattern.causal)
        place = torch.arange(PAGE)
        words = (tiles.bits[..., None] >> place & 1).bool()  # [masks, 64, 64]
        found = torch.zeros(-(-queries // PAGE), PAGE, -(-keys // PAGE) + 1, PAGE, dtype=torch.bool)
        for tile in range(len(tiles.counts)):
            start = int(tiles.starts[tile, 0])
            middle = start + int(tiles.whole[tile, 0])
            end = start + int(tiles.counts[tile, 0])
            found[tile, :, tiles.pages[start:middle].long()] = True
            partly = words[tiles.masks[middle:end].long()]  # [pages, 64, 64]
            some = partly[:, : queries - tile * PAGE]
            assert some.any(-1).any(-1).all() and not some.all(-1).all(-1).any()
            found[tile, :, tiles.pages[middle:end].long()] = partly.transpose(0, 1)
        found = found.flatten(2).flatten(0, 1)[:queries, :keys]
        assert int(tiles.attended(first, queries).sum()) == int(found.sum())
        return found

    return mask


@pytest.fixture(scope="session")
def patterns():
    """A hypothesis strategy of patterns; pages are 64 wide, so sizes lie around that."""
    size = st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 63, 64, 65, 128, 192, 2**31]))
    small = st.integers(1, 70)
    block = st.tuples(size, size).map(lambda pair: f"fixed:{max(pair)},{min(pair)}")
    primitive = st.one_of(
        st.just("full"),
        *(
            size.map(f"{name}:{{}}".format)
            for name in ("window", "global", "strided", "block_local", "sinks")
        ),
        st.builds("dilated:{},{}".format, size, size),
        block,
        st.builds("axial:{},{}".format, small, size),
        st.builds("random:{},{}".format, small, st.integers(0, 9)),
    )
    expression = st.recursive(
        primitive,
        lambda inner: st.builds(
            lambda parts, operator: f"({operator.join(parts)})",
            st.lists(inner, min_size=2, max_size=3),
            st.sampled_from("+&"),
        ),
        max_leaves=5,
    )
    ending = st.sampled_from(["", "@bidirectional"])
    return st.builds(lambda text, end: Pattern.parse(text + end), expression, ending)
