"""Sparse prefill: what tiles read, and attention over it, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import torch_tiles
from kernels.attention import Impl, dense_attention
from kernels.cache import LayerCache, Segment
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.prefill import (
    causal_density,
    causal_lists,
    choose,
    of_tiles,
    pattern_lists,
    tile_attention,
    visible_pairs,
)
from kernels.reference import masked_attention
from kernels.tiles import TURN

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


PATTERNS = [
    "full",
    "window:100",
    "window:4000",  # wider than any prompt here
    "sinks:4+window:70",
    "global:3+dilated:5,3",
    "strided:7+window:9",
    "fixed:16,3",
    "block_local:50",
    "axial:10,13",
    "random:1,3+window:2",
    "block_local:64&sinks:4",  # most queries see nothing
    "global:1+window:9@bidirectional",
]


@pytest.mark.parametrize("impl", [Impl.REFERENCE, *BACKENDS])
@pytest.mark.parametrize("text", PATTERNS)
def test_attention_over_a_patterns_lists_is_a_masked_softmax(prompt, text, impl):
    pattern, one = Pattern.parse(text), prompt("odd" if "@" in text else "cut")
    stop = one.segment.start + one.tokens
    selection, pairs = pattern_lists(pattern, one.segment, one.cache.kv_heads)
    output, lse, own = one.attend(selection, impl)
    mask = pattern.mask(one.tokens, stop, one.segment.start).to(DEVICE)  # [tokens, keys]
    seen = of_tiles(mask.sum(1).double(), one.segment)  # of a query, mean over each tile's
    queries = visible_pairs(one.segment, window=1)
    assert pairs.tolist() == pytest.approx((seen * queries).tolist())
    heads = one.query.shape[1]
    pages = one.cache.kv[:, one.segment.block_table].flatten(1, 2)[:, :stop]
    keys, values = pages.repeat_interleave(heads // one.cache.kv_heads, dim=0).unbind(2)
    expected, expected_lse = masked_attention(
        one.query,
        keys.expand(one.tokens, -1, -1, -1),
        values.expand(one.tokens, -1, -1, -1),
        mask[:, None].expand(-1, heads, -1),
        one.scale,
    )
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)
    assert torch.equal(lse, own)


@pytest.mark.parametrize("impl", [Impl.REFERENCE, *BACKENDS])
def test_the_order_of_tiles_is_of_no_matter(prompt, impl):
    one = prompt("odd")
    selection, _ = pattern_lists(Pattern.parse("global:70@bidirectional"), one.segment, 2)
    ordered = selection.longest_first()
    ordered.validate(0, one.tokens, one.tokens, causal=False)
    assert ordered.order.tolist() == [0, 1, 2, 3, 4]  # as they came where they are as long
    turned = replace(ordered, order=ordered.order.flip(0).contiguous())
    for ours, theirs in zip(one.attend(turned, impl), one.attend(selection, impl), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(KernelError, match="order"):
        replace(ordered, order=ordered.order * 0).validate(0, one.tokens, one.tokens, causal=False)


@pytest.mark.parametrize("impl", BACKENDS)
def test_low_precision_is_near_the_reference(prompt, impl):
    one = prompt("behind-pages", dtype=torch.float16)
    selection = one.choose(Impl.REFERENCE)
    expected = one.attend(selection, Impl.REFERENCE)
    for ours, theirs in zip(one.attend(selection, impl), expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("impl", [Impl.REFERENCE, *BACKENDS])
@pytest.mark.parametrize("least", [0.0, LEAST])
def test_a_tile_of_which_no_query_is_asked_reads_everything(prompt, least, impl):
    one = prompt("last-token")
    selection = one.choose(impl, least)
    assert not selection.left.any()
    output, _, _ = one.attend(selection, impl)
    dense = dense_attention(one.query, one.cache, one.segment, one.scale, impl=Impl.REFERENCE)
    torch.testing.assert_close(output, dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_sampled_key_far_above_its_pages_mean_does_not_overflow(impl):
    page, pages, head_dim, dtype = 2, 6, 32, torch.float16
    cache = LayerCache.allocate(pages, 1, head_dim, dtype, torch.device(DEVICE))
    generator = torch.Generator().manual_seed(2)
    tokens = pages * PAGE
    keys, values = torch.randn(2, tokens, 1, head_dim, generator=generator) * 0.01
    keys[page * PAGE + page * TURN % PAGE, 0, 0] = 60.0
    place = torch.arange(tokens, device=DEVICE)
    cache.write(place, keys.to(DEVICE), values.to(DEVICE))
    cache.code(torch.arange(pages, device=DEVICE))
    query = torch.zeros(PAGE, 2, head_dim, dtype=dtype, device=DEVICE)
    query[..., 0] = 0.25  # 15 nats, and a variance of some 0.01 in a page
    segment = Segment.of(list(range(pages)), tokens - PAGE, PAGE, torch.device(DEVICE))
    none = torch.zeros(1, 1, pages, dtype=torch.bool, device=DEVICE)
    one = query, cache, segment, causal_lists(none, segment), 1.0
    expected = tile_attention(*one, Impl.REFERENCE)
    for ours, theirs in zip(tile_attention(*one, impl), expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=4e-3, atol=4e-3)


def test_lists_of_many_masks_keep_no_bias(prompt, monkeypatch):
    made, kept = [], torch_tiles._Bias.of

    def watched(self, masks, pages):
        bias = kept(self, masks, pages)
        made.append((len(masks), sum(part.numel() for part in self._known.values())))
        return bias

    monkeypatch.setattr(torch_tiles._Bias, "of", watched)
    one = prompt("cut")
    for text in ("strided:7", "window:100"):
        lists, _ = pattern_lists(Pattern.parse(text), one.segment, one.cache.kv_heads)
        one.attend(lists, Impl.TORCH)
    width = -(-431 // PAGE) * PAGE * PAGE * 4
    strided, windows = made[: len(made) // 2], made[len(made) // 2 :]
    assert max(masks for masks, _ in strided) > torch_tiles.FEW
    assert strided[-1][1] <= 2 * width  # of the first lists alone, which are short
    assert windows[-1][1] <= 3 * width


def test_all_layers_share_a_patterns_lists(prompt, monkeypatch):
    one, other = prompt("cut"), prompt("odd")
    first = pattern_lists(Pattern.parse("strided:7"), one.segment, 2)
    monkeypatch.setattr(Pattern, "tiles", None)
    assert pattern_lists(Pattern.parse("strided:7"), one.segment, 2) is first
    with pytest.raises(TypeError):  # another segment's would have to be made
        pattern_lists(Pattern.parse("strided:7"), other.segment, 2)


def test_what_is_counted_is_counted_tile_by_tile(prompt):
    one = prompt("cut")  # positions 150 to 430
    seen = [sum(min(i + 1, 100) for i in range(a, b)) for a, b in ((150, 192), (384, 431))]
    assert visible_pairs(one.segment, 100)[[0, -1]].tolist() == seen
    values = torch.arange(150.0, 431.0, device=DEVICE)
    assert of_tiles(values, one.segment)[[0, -1]].tolist() == [170.5, 407.0]
    every = torch.ones(5, 1, 7, dtype=torch.bool, device=DEVICE)
    density = causal_density(causal_lists(every, one.segment), one.segment)
    assert density.tolist() == pytest.approx([1.0] * 5)
    density = causal_density(causal_lists(~every, one.segment), one.segment)
    own = [sum(i % PAGE + 1 for i in range(a, b)) for a, b in ((150, 192), (384, 431))]
    seen = [sum(i + 1 for i in range(a, b)) for a, b in ((150, 192), (384, 431))]
    assert density[[0, -1]].tolist() == pytest.approx([own[0] / seen[0], own[1] / seen[1]])


def test_what_does_not_fit_is_refused(prompt):
    one, other = prompt("cut"), prompt("odd")
    with pytest.raises(KernelError, match="tiles"):
        one.attend(other.choose(Impl.TORCH), Impl.TORCH)
    with pytest.raises(KernelError, match="segment has"):
        choose(one.query[1:], one.cache, one.segment, LEAST, one.scale)
