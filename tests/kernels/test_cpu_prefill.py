"""Sparse prefill in a CPU's tile registers, in bfloat16, against the reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kernels import reference_tiles
from kernels.attention import Impl
from kernels.cache import Segment
from kernels.cpu.amx import has_tiles, takes
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.prefill import choose, in_tiles, pattern_lists, tile_attention
from tests.kernels.test_prefill import LEAST, PATTERNS, SHAPES, Prompt

pytestmark = pytest.mark.skipif(
    not has_tiles() or torch.cuda.is_available(), reason="needs a CPU with AMX, and its tensors"
)
LONG = (64 * 150 + 7, 64 * 149 - 1, 1, 2, 32)
"""More pages than scores of their means are computed at once, in more than two words of flags."""


@pytest.fixture(params=[*SHAPES, "long"])
def one(paged, request):
    shape = LONG if request.param == "long" else SHAPES[request.param]
    return Prompt(paged, *shape, dtype=torch.bfloat16)


def assert_near(ours, theirs):
    """As bfloat16 is near: an output rounds values of about 1, and its weights before that."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-6, atol=2**-6)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_tile_registers_take_bfloat16_in_whole_blocks():
    assert takes(torch.bfloat16, 96)
    assert not takes(torch.float32, 128) and not takes(torch.bfloat16, 80)
    assert not in_tiles(torch.bfloat16, 128, Impl.TORCH)


def test_tiles_read_what_the_reference_reads_but_for_rounding(one):
    ours = one.choose(Impl.NUMBA).left
    where = (one.query, one.cache, one.segment)
    more, less = (
        reference_tiles.read_pages(*where, LEAST * factor, one.scale, 2) for factor in (0.98, 1.02)
    )
    first = one.segment.start // PAGE
    for tile in range(len(ours)):
        for head in range(ours.shape[1]):
            for page in range(first + tile):
                read = not int(ours[tile, head, page // PAGE]) >> page % PAGE & 1
                assert less[tile, head, page] <= read <= more[tile, head, page]


def test_reading_every_page_leaves_none(paged):
    one = Prompt(paged, *SHAPES["cut"], dtype=torch.bfloat16)
    assert not one.choose(Impl.NUMBA, least=0.0).left.any()


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.05])  # of queries; small ones find a page's keys alike
def test_attention_over_lists_is_the_references(one, means, factor):
    one.query = (one.query * factor).to(torch.bfloat16)
    selection = one.choose(Impl.NUMBA)
    if not means:
        selection = replace(selection, left=None)
    assert_near(one.attend(selection, Impl.NUMBA), one.attend(selection, Impl.REFERENCE))


@pytest.mark.parametrize("text", PATTERNS)
def test_attention_over_a_patterns_lists_is_the_references(paged, text):
    name = "odd" if "@" in text else "cut"
    one = Prompt(paged, *SHAPES[name], dtype=torch.bfloat16)
    selection, _ = pattern_lists(Pattern.parse(text), one.segment, one.cache.kv_heads)
    assert_near(one.attend(selection, Impl.NUMBA), one.attend(selection, Impl.REFERENCE))


def test_a_tile_gives_the_same_in_any_chunk_and_number_of_threads(paged):
    one = Prompt(paged, 64 * 12 + 9, 64 * 4, 2, 2, 64, dtype=torch.bfloat16)

    def run(first, stop):
        table = one.segment.block_table.tolist()
        segment = Segment.of(table, one.segment.start + first, stop - first, torch.device("cpu"))
        where = (one.query[first:stop], one.cache, segment)
        selection = choose(*where, LEAST, one.scale, Impl.NUMBA)
        return tile_attention(*where, selection, one.scale, Impl.NUMBA)

    whole, edges, before = run(0, one.tokens), [0, 64, 256, one.tokens], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        parts = [run(*edge) for edge in pairwise(edges)]
    finally:
        torch.set_num_threads(before)
    for expected, *some in zip(whole, *parts, strict=True):
        assert torch.equal(expected, torch.cat(some))


def test_what_is_no_number_shows_where_it_is_seen_alone(paged):
    one = Prompt(paged, *SHAPES["cut"], dtype=torch.bfloat16)
    selection = one.choose(Impl.NUMBA)
    expected = one.attend(selection, Impl.NUMBA)
    last, used = divmod(one.segment.start + one.tokens, PAGE)
    one.cache.kv[:, one.segment.block_table[last], used:] = torch.nan  # behind the last key
    for ours, theirs in zip(one.attend(selection, Impl.NUMBA), expected, strict=True):
        assert torch.equal(ours, theirs)
    one.query[100, 1] = torch.nan
    output, lse, own = one.attend(selection, Impl.NUMBA)
    there = torch.ones(one.query.shape[:2], dtype=torch.bool)
    there[100, 1] = False
    for ours, theirs in zip((output, lse, own), expected, strict=True):
        assert torch.equal(ours[there], theirs[there])
        assert ours[100, 1].isnan().all()
    read = one.choose(Impl.NUMBA).left[(one.segment.start % PAGE + 100) // PAGE]
    assert not read.any()  # what is no number reads everything
