"""Dense prefill: a library's kernel over the keys far behind, ours over those near the tokens.

cuDNN attends fastest where every query sees every key, but for each new shape it first makes a
plan, some fifty milliseconds long. So it is asked for few shapes: keys in runs of powers of two.
What is left of them, and the tokens' own keys, which not all see, go through `kernels.gpu.tiles`,
and the parts are joined by their log-sum-exps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.gpu.tiles import tile_attention
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.patterns.window import Window
from kernels.prefill import causal_bits, pattern_lists
from kernels.tiles import TileSelection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment

FEWEST = 512
"""Tokens of a segment from which on the library is asked."""
STEP = 1024
"""A segment's tokens are padded to a multiple of these, for few shapes."""
RUN = 4096
"""Keys of the shortest run."""
CHANNELS = 128
"""Of a head, at the most, that cuDNN takes on any of its versions."""


def dense_attention(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float, window: int | None
) -> Tensor:
    """See `kernels.attention.dense_attention`."""
    if window is not None and window < segment.start + segment.tokens:
        seen, _ = pattern_lists(Pattern(Window(window)), segment, cache.kv_heads)
        return tile_attention(query, cache, segment, seen, scale)[0]
    # The library's kernel knows nothing of distance.
    library = _suits(query) and cache.slopes is None
    behind = segment.start // RUN * RUN if library else 0
    near = _causal(segment, behind // PAGE, cache.kv_heads)
    output, lse, _ = tile_attention(query, cache, segment, near, scale)
    if behind == 0:
        return output
    joined = output.float()  # [tokens, heads, head_dim]
    for part, part_lse in _far(query, cache, segment, behind, scale):
        joined.lerp_(part.float(), torch.sigmoid(part_lse - lse)[..., None])
        lse = torch.logaddexp(lse, part_lse)
    return joined.to(query.dtype)


def _suits(query: Tensor) -> bool:
    """Whether the library takes these queries, and they are worth it."""
    tokens, _, head_dim = query.shape
    half = query.dtype in (torch.bfloat16, torch.float16)
    return (
        tokens >= FEWEST
        and half
        and head_dim % 8 == 0
        and head_dim <= CHANNELS
        and query.device.type == "cuda"
        and torch.backends.cudnn.enabled
    )


def _causal(segment: Segment, first: int, kv_heads: int) -> TileSelection:
    """Lists of the pages from `first` up to each tile's own."""
    device = segment.block_table.device
    tile = torch.arange(segment.start // PAGE, len(segment.block_table), device=device)
    whole = (tile - first).int()[:, None].expand(-1, kv_heads)
    pages = torch.arange(first, len(segment.block_table), dtype=torch.int32, device=device)
    return TileSelection(
        starts=torch.zeros_like(whole, dtype=torch.int64),
        counts=whole + 1,
        whole=whole,
        pages=pages,
        masks=torch.zeros_like(pages),
        bits=causal_bits(device),
    )


def _far(
    query: Tensor, cache: LayerCache, segment: Segment, behind: int, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Attention over the first `behind` keys: outputs [tokens, heads, d] and log-sum-exps."""
    tokens, _, head_dim = query.shape
    kv_heads = cache.kv_heads
    padded = F.pad(query, (0, 0, 0, 0, 0, -tokens % STEP))
    # A group's heads are rows beside each other's tokens: keys are read once for all of them.
    rows = padded.view(len(padded), kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    start, pages = segment.run
    if pages * PAGE >= behind:  # they lie in order, and stay where they are
        kept = cache.kv[:, start : start + behind // PAGE]
    else:
        kept = cache.kv.index_select(1, segment.block_table[: behind // PAGE])
    keys, values = kept.flatten(1, 2)[None].unbind(3)  # [1, kv_heads, behind, head_dim]
    parts, first = [], 0
    while first < behind:
        run = RUN
        while first + 2 * run <= behind:
            run *= 2
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            rows[None], keys[:, :, first : first + run], values[:, :, first : first + run],
            None, True, 0.0, False, False, scale=scale,
        )  # fmt: skip
        output = output.view(kv_heads, -1, len(padded), head_dim).permute(2, 0, 1, 3)
        lse = lse.view(kv_heads, -1, len(padded)).permute(2, 0, 1)
        parts.append((output.flatten(1, 2)[:tokens], lse.flatten(1)[:tokens]))
        first += run
    return parts
