"""Sparse prefill: pages of queries that look at pages of keys, and at the means of the others.

A tile is a page of queries: 64 positions of one KV head's group. A page of keys is read as it is
where, by estimate, some query of the tile would find `least` of its attention mass there; every
other query is asked. The first page, the tile's own and the one before it always are. For each
other page a key and a value stand: their means, counted 64 times. A tile's scores come from these
means too, which a page gets when it fills: what a tile reads depends on its queries and the keys
before it alone, not on the chunk in which it is computed, nor on who filled the cache. (Of a tile
that a chunk's edge cuts, each part decides for itself. The engine cuts at multiples of 64.)

Estimates from blocks' means: Tang et al. 2024, "Quest"; Jiang et al. 2024, "MInference 1.0"; Xu et
al. 2025, "XAttention". That the means of the unread blocks carry their mass is akin to the
centroids of Vyas et al. 2020, "Fast Transformers with Clustered Attention".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import reference, torch_tiles
from kernels.attention import Impl, check_query
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.tiles import TileSelection, packed
from kernels.torch_backend import wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment

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
        least: share of a query's mass from which on a page is read; 0 reads every page.
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
        read = reference.read_pages(query, cache, segment, least, scale, ASKED)
    else:
        read = torch_tiles.read_pages(query, cache, segment, least, scale, ASKED)
    return causal_lists(read, segment)


def causal_lists(read: Tensor, segment: Segment) -> TileSelection:
    """The lists of tiles that see their own page up to each query, and others before it whole.

    Args:
        read: bool [tiles, kv_heads, pages], those that are read; only a tile's past matters.
        segment: where the tiles stand.
    """
    tiles, kv_heads, pages = read.shape
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


def causal_bits(device: torch.device) -> Tensor:
    """int64 [1, 64], the mask of a page that queries of the same page see up to themselves."""
    place = torch.arange(PAGE, device=device)
    return (-1 << (place + 1)).bitwise_not().masked_fill(place == PAGE - 1, -1)[None]


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
    tiles = segment.block_table.shape[0] - segment.start // PAGE
    if tuple(selection.counts.shape) != (tiles, cache.kv_heads):
        raise KernelError(
            f"the selection must have [tiles, kv_heads] = {[tiles, cache.kv_heads]}, "
            f"not {list(selection.counts.shape)}"
        )
    if impl is Impl.TRITON:
        from kernels.gpu.tiles import tile_attention as attention_on_gpu  # a CPU has no Triton

        return attention_on_gpu(query, cache, segment, selection, scale)
    if impl is Impl.REFERENCE:
        output, lse, own = reference.tile_attention(query, cache, segment, selection, scale)
        return output.to(query.dtype), lse.to(wide(query.dtype)), own.to(wide(query.dtype))
    return torch_tiles.tile_attention(query, cache, segment, selection, scale)


def _check(query: Tensor, cache: LayerCache, segment: Segment, impl: Impl) -> None:
    check_query(query, cache, impl)
    if query.shape[0] != segment.tokens:
        raise KernelError(f"the segment has {segment.tokens} tokens, the query {query.shape[0]}")
