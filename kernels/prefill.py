"""Sparse prefill: pages of queries that look at pages of keys, and at the means of the others.

A tile is a page of queries: 64 positions of one KV head's group. For a page of keys its means can
stand: a key and a value, counted 64 times. That is exact where a query finds all of its keys alike,
and the further off the more they differ for it. A page is read as it is where, by estimate, some
query of the tile would lose more than `least` of its attention mass to its mean; every other query
is asked, and a tile that has none of these reads all. The first page, the tile's own and the one
before it always are.

A query's scores on the keys of a page are taken for normal, with the score u of their mean for mean
and a variance v that is |q|^2 times what keys vary in a channel, mean over all pages before the
tile. The page then carries 64 e^(u + v / 2), and a sum over 64 such weights is off by
sqrt((e^v - 1) / 64) of it. So heads that look at pages as a whole, or everywhere alike, read
little, and a head that looks for single keys, which no mean tells of, reads nearly everything.

What differs alike from page to page does not average out, though: where attention is nearly level,
the keys that get a little more of it add up. So for a query whose v is small two keys of each page
stand for it as well, and the means only weigh what the mean value has over theirs. That is right on
average, and the less the scores vary the less by chance (the means are a control variate of the
sample; Owen 2013, "Monte Carlo theory, methods and examples", 8.9).

Where scores fall with distance (`kernels.alibi`) a page's keys have known weights e^b besides,
whose sum takes the place of 64: it carries e^(u + v / 2) times that, and is off by
sqrt(e^v / N - 1 / 64), where N is how many keys of equal weights would be as uneven. So steep heads
read what is near.

What a tile reads depends on its queries and the keys before it alone, not on the chunk in which it
is computed, nor on who filled the cache: a page gets its means when it fills. (Of a tile that a
chunk's edge cuts, each part decides for itself. The engine cuts at multiples of 64.)

Estimates from blocks' means: Tang et al. 2024, "Quest"; Jiang et al. 2024, "MInference 1.0"; Xu et
al. 2025, "XAttention". That the means of the unread blocks carry their mass is akin to the
centroids of Vyas et al. 2020, "Fast Transformers with Clustered Attention".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels import reference_tiles, torch_tiles
from kernels.attention import Impl, check_query
from kernels.bits import first_bits, packed
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.softmax import wide
from kernels.tiles import TileSelection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.patterns.pattern import Pattern

ASKED = 2
"""Of so many queries on end, the last one is asked what it would read."""


def choose(
    query: Tensor,
    cache: LayerCache,
    segment: Segment,
    least: float,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> TileSelection:
    """Choose the pages that each tile of a segment reads, by content.

    Args:
        query: [tokens, heads, head_dim]; the tokens' own keys are already in the cache.
        cache: the layer's paged cache, complete pages with their means.
        segment: where the tokens stand and where their keys lie.
        least: share of a query's mass from which on an error is too much; 0 reads every page.
        scale: factor on the scores.
        impl: backend.

    Returns:
        The pages, and those for which their means stand. What is not a number is read.

    Raises:
        KernelError: when the shapes or dtypes do not fit together.
    """
    _check(query, cache, segment, impl)
    if impl is Impl.TRITON:
        from kernels.gpu.choose import choose as choose_on_gpu  # a CPU has no Triton

        return choose_on_gpu(query, cache, segment, least, scale, ASKED)
    if impl is Impl.REFERENCE:
        read = reference_tiles.read_pages(query, cache, segment, least, scale, ASKED)
    elif cache.slopes is None and in_tiles(query.dtype, query.shape[2], impl):
        from kernels.cpu.choose import read_pages  # numba takes a moment

        read = read_pages(query, cache, segment, least, scale, ASKED)
    else:
        read = torch_tiles.read_pages(query, cache, segment, least, scale, ASKED)
    return causal_lists(read, segment)


def causal_lists(read: Tensor, segment: Segment) -> TileSelection:
    """The lists of tiles that see their own page up to each query, and others before it whole.

    Args:
        read: bool [tiles, kv_heads, pages], those that are read; only a tile's past matters.
        segment: where the tiles stand.
    """
    tiles, _, pages = read.shape
    first, device = segment.start // PAGE, read.device
    page = torch.arange(pages, device=device)
    tile = first + torch.arange(tiles, device=device)
    past = (page < tile[:, None])[:, None]  # [tiles, 1, pages]
    listed = (read & past) | (page == tile[:, None])[:, None]
    counts = listed.sum(-1)  # [tiles, kv_heads]
    starts = counts.flatten().cumsum(0).view(counts.shape) - counts
    chosen = listed.nonzero()[:, 2].int()  # ascending, so a tile's own is its last
    return TileSelection(
        starts=starts,
        counts=counts.int(),
        whole=counts.int() - 1,
        pages=chosen,
        masks=torch.zeros_like(chosen),
        bits=causal_bits(device),
        left=packed(past & ~read),
    )


def pattern_lists(
    pattern: Pattern, segment: Segment, kv_heads: int
) -> tuple[TileSelection, Tensor]:
    """The pages that a segment's tiles read by a causal pattern, made once for all layers.

    Returns:
        The lists, and the pairs of a query and a key in each tile's, float64 [tiles].
    """
    if (pattern, kv_heads) not in segment.known:
        first, stop = segment.start // PAGE * PAGE, segment.start + segment.tokens
        device = segment.block_table.device
        lists = pattern.tiles(first, stop - first, stop, device, kv_heads)
        pairs = lists.attended(segment.start, segment.tokens).double().mean(1)
        segment.known[pattern, kv_heads] = lists, pairs
    return segment.known[pattern, kv_heads]


def causal_density(selection: TileSelection, segment: Segment) -> Tensor:
    """Keys read over keys visible by each tile's tokens and all KV heads: float64 [tiles].

    Of lists as `causal_lists` makes them, of which nothing has to be waited for.
    """
    position = _positions(segment)
    whole = selection.whole.double().mean(1)  # [tiles]  pages that each of its tokens reads
    # Of its own page query i sees i + 1 keys.
    read = whole * PAGE * _sums(torch.ones_like(position), segment)
    read += _sums(position % PAGE + 1, segment)
    return read / visible_pairs(segment)


def visible_pairs(segment: Segment, window: int | None = None) -> Tensor:
    """Keys that a segment's causal queries see, those of each tile together: int64 [tiles]."""
    seen = _positions(segment) + 1
    return _sums(seen if window is None else seen.clamp_max(window), segment)


def of_tiles(values: Tensor, segment: Segment) -> Tensor:
    """The mean of values [tokens] over the tokens of each tile: [tiles]."""
    return _sums(values, segment) / _sums(torch.ones_like(values), segment)


def _positions(segment: Segment) -> Tensor:
    stop = segment.start + segment.tokens
    return torch.arange(segment.start, stop, device=segment.block_table.device)  # [tokens]


def _sums(values: Tensor, segment: Segment) -> Tensor:
    """Values [tokens] summed up for each tile: [tiles]."""
    behind = -(segment.start + segment.tokens) % PAGE
    return F.pad(values, (segment.start % PAGE, behind)).view(-1, PAGE).sum(1)


def causal_bits(device: torch.device) -> Tensor:
    """int64 [1, 64], the mask of a page that queries of the same page see up to themselves."""
    return first_bits(torch.arange(1, PAGE + 1, device=device))[None]


def tile_attention(
    query: Tensor,
    cache: LayerCache,
    segment: Segment,
    selection: TileSelection,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a segment's tokens over the pages that their tiles read, whatever chose them.

    Args:
        query: [tokens, heads, head_dim]; the tokens' own keys are already in the cache.
        cache: the layer's paged cache, complete pages with their means.
        segment: where the tokens stand and where their keys lie.
        selection: the pages that each tile reads, and those for which their means stand.
        scale: factor on the scores, usually head_dim ** -0.5.
        impl: backend.

    Returns:
        Output [tokens, heads, head_dim] in the query's dtype and, in float32 (float64 for float64
        inputs), the log-sum-exp [tokens, heads] with what stands for unread pages and that of the
        keys read alone. A token that sees no key gives 0 and -inf.

    Raises:
        KernelError: when the shapes or dtypes do not fit together.
    """
    _check(query, cache, segment, impl)
    if tuple(selection.counts.shape) != (segment.tiles, cache.kv_heads):
        raise KernelError(
            f"the selection must have [tiles, kv_heads] = {[segment.tiles, cache.kv_heads]}, "
            f"not {list(selection.counts.shape)}"
        )
    if impl is Impl.TRITON:
        from kernels.gpu.tiles import tile_attention as attention_on_gpu  # a CPU has no Triton

        return attention_on_gpu(query, cache, segment, selection, scale)
    if cache.slopes is None and in_tiles(query.dtype, query.shape[2], impl):
        from kernels.cpu.tiles import tile_attention as attention_on_cpu  # numba takes a moment

        return attention_on_cpu(query, cache, segment, selection, scale)
    if impl is Impl.REFERENCE:
        output, lse, own = reference_tiles.tile_attention(query, cache, segment, selection, scale)
        return output.to(query.dtype), lse.to(wide(query.dtype)), own.to(wide(query.dtype))
    return torch_tiles.tile_attention(query, cache, segment, selection, scale)


def in_tiles(dtype: torch.dtype, head_dim: int, impl: Impl) -> bool:
    """Whether a CPU's tile registers attend to pages: much faster than what torch offers there.

    They know nothing of scores that fall with the distance (`kernels.alibi`).
    """
    if impl is not Impl.NUMBA:
        return False
    from kernels.cpu.amx import takes  # numba takes a moment

    return takes(dtype, head_dim)


def _check(query: Tensor, cache: LayerCache, segment: Segment, impl: Impl) -> None:
    check_query(query, cache, impl)
    if query.shape[0] != segment.tokens:
        raise KernelError(f"the segment has {segment.tokens} tokens, the query {query.shape[0]}")
