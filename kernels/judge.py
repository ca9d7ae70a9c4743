"""How much of the attention mass a selection carries, whoever made it: exactly, or estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.alibi import bias_at
from kernels.attention import Impl, dense_decode
from kernels.codes import estimate
from kernels.page import PAGE
from kernels.scores import recent_positions, score_every_key, scores_at, sees
from kernels.selection import unselected
from kernels.softmax import wide
from kernels.torch_selected import at_once

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


def true_coverage(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    selection: Selection | None,
    own: Tensor,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> Tensor:
    """Share of the attention mass that a selection carries: every key is read, in float32.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        selection: the keys each row attends to; of no need where dense attention tells its mass.
        own: [rows, heads], log-sum-exp of attention over the selected keys, each counted once.
        scale: factor on the scores.
        impl: backend.

    Returns:
        [rows, heads], 0 to 1.
    """
    if impl is Impl.TRITON:
        return (own - dense_decode(query, cache, rows, scale, impl)[1]).exp().clamp_max(1)
    assert selection is not None
    longest = int(rows.visible.max()) + 2 * PAGE
    parts = []
    for part, piece in rows.pieces(at_once(query.device, 8 * query.shape[1] * longest)):
        scored = score_every_key(query[part].to(wide(query.dtype)), cache, piece, scale)
        left = unselected(
            selection.indices[part], scored.scores.shape[-1], scored.position[..., :1]
        )
        rest = scored.scores.masked_fill(~left[:, :, None], -torch.inf).logsumexp(-1)
        parts.append(torch.sigmoid(own[part] - rest.flatten(1)))
    return torch.cat(parts)


def estimated_coverage(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    selection: Selection,
    lse: Tensor,
    own: Tensor,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> Tensor:
    """Estimate the share of the attention mass that a selection carries.

    A sample's weights tell the whole mass. What any other selection leaves out is estimated from
    the codes of the keys; the recent window is scored exactly.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        selection: the keys each row attends to.
        lse: [rows, heads], log-sum-exp of attention over them, weights included.
        own: [rows, heads], the same without weights.
        scale: factor on the scores.
        impl: backend.

    Returns:
        [rows, heads], 0 to 1 and a little above; nan where a score is.
    """
    if selection.log_weight is not None:
        return (own - lse).exp()
    if impl is Impl.TRITON:
        from kernels.gpu.judge import log_mass  # a CPU has no Triton

        return (own - log_mass(query, cache, rows, scale)).exp().clamp_max(1)
    if impl is Impl.NUMBA:
        from kernels.cpu.left import mass_left  # numba takes a moment

        return torch.sigmoid(own - mass_left(query, cache, rows, selection, scale))
    each = (8 * query.shape[1] + cache.kv_heads * cache.head_dim) * int(rows.visible.max())
    lefts = [
        _mass_left(query[part], cache, piece, selection.rows(part), scale)
        for part, piece in rows.pieces(at_once(query.device, each))
    ]
    return torch.sigmoid(own - torch.cat(lefts))


def _mass_left(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Tensor:
    """Log of the estimated mass that a selection leaves out, [rows, heads]."""
    some, stops = selection.indices, rows.recent_page[:, None] * PAGE
    first = int(rows.starts.min()) // PAGE
    last = max(first, int(rows.recent_page.max()))
    position = torch.arange(first * PAGE, last * PAGE, device=query.device)
    coded = (position < stops) & (position >= rows.starts[:, None])  # [rows, keys]
    coded = coded[:, None] & unselected(some, position.shape[0], first * PAGE)
    late = recent_positions(rows, cache.kv_heads)  # [rows, kv_heads, 2 * 64]
    recent = sees(late, rows) & unselected(some, 2 * PAGE, stops[..., None])
    early = estimate(query.to(wide(query.dtype)) * scale, cache, rows, first, last)
    if cache.slopes is not None:
        early.add_(bias_at(cache, position.expand(1, 1, -1), rows.lengths - 1))
    # [rows, kv_heads, group, keys + 2 * 64]
    scores = torch.cat((early, scores_at(query, cache, rows, late, scale)), dim=-1)
    left = torch.cat((coded, recent), dim=-1)[:, :, None]
    return scores.masked_fill_(~left, -torch.inf).logsumexp(-1).flatten(1)
