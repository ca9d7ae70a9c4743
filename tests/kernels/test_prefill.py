"""Sparse prefill: what tiles read, and attention over it, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.attention import Impl, dense_attention
from kernels.cache import LayerCache, Segment
from kernels.page import PAGE
from kernels.prefill import choose, tile_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST = 0.5
"""Much: these prompts have few pages."""
BACKENDS = [Impl.TORCH, Impl.TRITON]
SHAPES = {  # length, where the segment starts, KV heads, group, head_dim
    "one-token": (1, 0, 1, 1, 32),
    "one-page": (64, 0, 2, 2, 32),
    "odd": (301, 0, 2, 3, 32),
    "behind-pages": (500, 320, 2, 2, 64),
    "cut": (431, 150, 1, 4, 32),
    "last-token": (449, 448, 2, 2, 32),
    "wide-heads": (200, 64, 1, 2, 96),
}


class Prompt:
    """The last tokens of a sequence whose keys are all cached; queries look at a few places."""

    def __init__(self, paged, length, start, kv_heads, group, head_dim, dtype=torch.float32):
        case = paged([length], kv_heads, head_dim, dtype)
        self.cache = LayerCache(*(part.to(DEVICE) for part in case.cache.parts))
        self.tokens = length - start
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.tokens, kv_heads * group, head_dim, generator=generator)
        # Some queries resemble the mean of a page's keys: their mass lies there.
        liked = torch.randint(-(-length // PAGE), (self.tokens,), generator=generator)
        means = torch.stack([part.float().mean(0) for part in case.keys[0].split(PAGE)])
        much = (torch.rand(self.tokens, 1, 1, generator=generator) < 0.02) * 60.0
        keys = much * means[liked].repeat_interleave(group, dim=1)
        self.query = (noise / 2 + keys).to(dtype).to(DEVICE)
        self.scale = head_dim**-0.5
        self.segment = Segment.of(case.tables[0], start, self.tokens, torch.device(DEVICE))

    def choose(self, impl, least=LEAST):
        return choose(self.query, self.cache, self.segment, least, self.scale, impl)

    def attend(self, selection, impl):
        return tile_attention(self.query, self.cache, self.segment, selection, self.scale, impl)


@pytest.fixture
def prompt(paged):
    def build(name, **other):
        return Prompt(paged, *SHAPES[name], **other)

    return build


def pages_of(selection):
    """Each tile's and KV head's list: {(tile, head): [pages]}."""
    lists = {}
    for tile in range(selection.counts.shape[0]):
        for head in range(selection.counts.shape[1]):
            start, count = int(selection.starts[tile, head]), int(selection.counts[tile, head])
            lists[tile, head] = selection.pages[start : start + count].tolist()
    return lists


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_tiles_read_what_the_reference_reads(prompt, name, impl):
    one = prompt(name)
    ours, theirs = one.choose(impl), one.choose(Impl.REFERENCE)
    assert pages_of(ours) == pages_of(theirs)
    assert torch.equal(ours.left, theirs.left)
    assert torch.equal(ours.whole, ours.counts - 1)
    first = one.segment.start // PAGE
    for (tile, _), pages in pages_of(ours).items():
        own = first + tile
        assert pages[-1] == own and {0, max(0, own - 1)} <= set(pages)
    if name in {"behind-pages", "cut"}:  # not everything, and not nothing
        assert ours.left.any() and max(map(len, pages_of(ours).values())) > 3


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_over_lists_is_the_references(prompt, name, means, impl):
    one = prompt(name)
    selection = one.choose(Impl.REFERENCE)
    if not means:
        selection = replace(selection, left=None)
    expected = one.attend(selection, Impl.REFERENCE)
    for ours, theirs in zip(one.attend(selection, impl), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", [Impl.REFERENCE, *BACKENDS])
def test_reading_every_page_is_dense_attention(prompt, impl):
    one = prompt("cut")
    selection = one.choose(impl, least=0.0)
    assert not selection.left.any()
    output, lse, own = one.attend(selection, impl)
    dense = dense_attention(one.query, one.cache, one.segment, one.scale, impl=Impl.REFERENCE)
    torch.testing.assert_close(output, dense, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, own)
