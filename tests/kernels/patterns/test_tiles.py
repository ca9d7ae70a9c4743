"""Lists of pages: odd shapes, few masks, long prompts, and what `validate` refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.errors import KernelError, PatternError
from kernels.page import PAGE
from kernels.patterns import places
from kernels.patterns.pattern import Pattern
from kernels.patterns.strided import Strided

MILLION = 1 << 20
CASES = [
    *("full", "sinks:16+window:300", "window:512+strided:128", "window:100+strided:48"),
    *("fixed:128,8", "fixed:100,30", "dilated:20,96", "axial:40,64", "axial:16,50", "random:3,1"),
    *("block_local:200", "random:2,0+strided:64", "(sinks:70+window:200)&strided:3"),
    *("longformer", "bigbird", "global:200+window:130@bidirectional", "strided:100@bidirectional"),
    *("fixed:128,8@bidirectional", "dilated:9,70@bidirectional", "axial:20,64@bidirectional"),
]


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize(
    ("first", "queries", "keys"),
    [
        *((0, 1, 1), (0, 64, 64), (0, 65, 65), (0, 2048, 2048), (0, 2000, 2000)),
        *((1920, 128, 2048), (1920, 130, 2050), (640, 1000, 1640), (128, 64, 70), (64, 100, 1500)),
    ],
)
def test_tiles_of_any_part_of_a_prompt(text, first, queries, keys, listed):
    pattern = Pattern.parse(text)
    assert torch.equal(listed(pattern, first, queries, keys), pattern.mask(queries, keys, first))


@pytest.mark.parametrize("text", CASES)
def test_chunks_of_a_prompt_list_what_one_piece_does(text):
    pattern, n = Pattern.parse(text), 1000
    whole = pattern.tiles(0, n, n, "cpu")
    for first in range(0, n, 320):
        queries = min(320, n - first)
        keys = first + queries if pattern.causal else n
        part = pattern.tiles(first, queries, keys, "cpu")
        for tile in range(len(part.counts)):
            for one, at in ((part, tile), (whole, first // PAGE + tile)):
                start, count = int(one.starts[at, 0]), int(one.counts[at, 0])
                pages = one.pages[start : start + count].tolist()
                if one is part:
                    expected = pages, int(part.whole[tile, 0])
            assert (pages, int(whole.whole[first // PAGE + tile, 0])) == expected


def test_all_kv_heads_share_one_list():
    tiles = Pattern.parse("sinks:16+window:300").tiles(0, 1000, 1000, "cpu", kv_heads=8)
    for part in (tiles.starts, tiles.counts, tiles.whole):
        assert part.shape == (16, 8)
        assert part.stride(1) == 0
    tiles.validate(0, 1000, 1000)


def test_nothing_to_list():
    for text in ("full", "sinks:16+strided:2", "bigbird"):
        pattern = Pattern.parse(text)
        assert pattern.tiles(0, 0, 0, "cpu").counts.shape == (0, 1)
        assert pattern.tiles(0, 0, 100, "cpu").counts.shape == (0, 1)
        assert pattern.tiles(0, 100, 0, "cpu").counts.tolist() == [[0], [0]]
    # Its first tile sees nothing: there is no block before it.
    assert Pattern.parse("random:3,0").tiles(0, 100, 100, "cpu").counts.tolist() == [[0], [1]]


def test_tiles_begin_at_a_page():
    with pytest.raises(PatternError, match="a multiple of 64, not at 100"):
        Pattern.parse("full").tiles(100, 10, 110, "cpu")


@pytest.mark.parametrize(
    ("text", "masks", "places"),
    [  # tiles are 16,384
        ("sinks:16+window:4096", 4, 1_100_000),
        ("window:512", 2, 180_000),
        ("block_local:128", 1, 25_000),
        ("longformer", 6, 181_000),
        ("bigbird", 4, 220_000),
        ("dilated:64,4096", 1, 920_000),
        ("window:512+strided:16384", 3, 720_000),
    ],
)
def test_a_million_tokens_have_few_masks(text, masks, places):
    pattern = Pattern.parse(text)
    tiles = pattern.tiles(0, MILLION, MILLION, "cpu")
    assert len(tiles.counts) == MILLION // PAGE
    assert len(tiles.bits) <= masks
    assert len(tiles.pages) <= places
    assert int(tiles.attended(0, MILLION).sum()) == pattern.selected_keys(MILLION)


def last(n, most):
    """Pairs of causal queries that see the last `most` keys."""
    return sum(min(i + 1, most) for i in range(min(n, most))) + max(n - most, 0) * most


@pytest.mark.parametrize("n", [1, 1000, 8191, 8192, 100_003])
def test_pairs_of_long_prompts_have_a_closed_form(n):
    def pairs(text):
        return Pattern.parse(text).selected_keys(n)

    assert pairs("full") == n * (n + 1) // 2
    assert pairs("window:4096") == last(n, 4096)
    assert pairs("sinks:16") == last(n, 16)
    assert pairs("sinks:16+window:4096") == last(n, 4096) + last(max(n - 4096, 0), 16)
    assert pairs("strided:128") == sum(i // 128 + 1 for i in range(n))
    assert pairs("fixed:128,8") == sum(i // 128 * 8 + i % 128 + 1 for i in range(n))
    assert pairs("block_local:100") == sum(i % 100 + 1 for i in range(n))
    assert pairs("dilated:7,100") == sum(min(i // 100 + 1, 7) for i in range(n))
    assert pairs("random:3,5") == sum(min(i // 64, 3) * 64 for i in range(n))
    assert pairs("global:5@bidirectional") == n * n - max(n - 5, 0) ** 2


TILES = Pattern.parse("sinks:16+window:300").tiles(0, 500, 500, "cpu", kv_heads=2)
BROKEN = {
    "tiles are not those": {"counts": TILES.counts[:-1]},
    "shapes do not fit": {"masks": TILES.masks[:-1]},
    "shapes do not fit together": {"bits": TILES.bits[:, :-1]},
    "a dtype that is not theirs": {"pages": TILES.pages.long()},
    "more pages that are seen whole": {"whole": TILES.counts + 1},
    "lies outside the places": {"starts": TILES.starts + 1},
    "a page that does not exist": {"pages": TILES.pages + 1},
    "do not ascend": {"pages": TILES.pages.flip(0)},
    "has no mask": {"masks": TILES.masks + len(TILES.bits)},
    "a key which may not be seen": {"bits": torch.full_like(TILES.bits, -1)},
}


@pytest.mark.parametrize("says", BROKEN)
def test_lists_that_break_a_promise_are_refused(says):
    TILES.validate(0, 500, 500)
    with pytest.raises(KernelError, match=says):
        replace(TILES, **BROKEN[says]).validate(0, 500, 500)


def test_a_whole_page_holds_no_later_key():
    tiles = Pattern.parse("block_local:64").tiles(0, 500, 500, "cpu")
    with pytest.raises(KernelError, match="a page is seen whole that holds a key which may not"):
        replace(tiles, whole=tiles.counts).validate(0, 500, 500)


def test_a_page_is_listed_once_and_read_or_stood_for():
    twice = replace(TILES, whole=TILES.whole.clamp_max(1), pages=TILES.pages.clamp_max(0))
    few = {"starts": twice.starts, "counts": twice.counts.clamp_max(2)}
    with pytest.raises(KernelError, match="holds a page twice"):
        replace(twice, **few).validate(0, 500, 500)
    left = torch.zeros(8, 2, 1, dtype=torch.int64)
    replace(TILES, left=left).validate(0, 500, 500)
    with pytest.raises(KernelError, match="its mean stands for it, too"):
        replace(TILES, left=left + 1).validate(0, 500, 500)


def test_pairs_of_a_chunk_that_begins_and_ends_in_a_tile():
    pattern, n = Pattern.parse("sinks:16+window:100"), 700
    tiles = pattern.tiles(128, n - 128, n, "cpu", kv_heads=2)
    expected = pattern.mask(n, n)
    for first, queries in ((128, n - 128), (150, 300), (130, 1), (128, 64)):
        found = tiles.attended(first, queries)
        assert found.sum(0).tolist() == [int(expected[first : first + queries].sum())] * 2


MANY = "+".join(f"strided:{67 + 2 * i}+fixed:{68 + 3 * i},3" for i in range(8))


def test_masks_that_all_differ_are_joined_from_the_primitives(monkeypatch, listed):
    looked, sees = [], Strided.sees

    def watched(self, query, key, causal):
        looked.append((query - key).numel() // PAGE**2)
        return sees(self, query, key, causal)

    pattern, n = Pattern.parse(MANY), 5000
    with monkeypatch.context() as patch:
        patch.setattr(Strided, "sees", watched)
        tiles = pattern.tiles(0, n, n, "cpu")
    assert len(tiles.bits) > 3000  # nearly as many as there are pairs of a tile and a page
    assert sum(looked) < 8 * 3 * (2 * PAGE + 1)
    monkeypatch.setattr(places, "FEW", 0)
    for first, queries, keys in ((0, 700, 700), (128, 300, 428), (64, 100, 400)):
        mask = pattern.mask(queries, keys, first)
        assert torch.equal(listed(pattern, first, queries, keys), mask)
