"""How much of the attention mass a selection carries, whoever made it: exactly, or estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.candidates import estimate_masses
from kernels.dynamic import Choice
from kernels.page import PAGE
from kernels.scores import recent_positions, score_every_key, scores_at, sees
from kernels.torch_backend import at_once, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


def true_coverage(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, lse: Tensor, scale: float
) -> Tensor:
    """Share of the attention mass that a selection carries: every key is read, in float32.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        selection: the keys each row attends to.
        lse: [rows, heads], log-sum-exp of attention over the selection.
        scale: factor on the scores.

    Returns:
        [rows, heads], 0 to 1.
    """
    longest = int(rows.visible.max()) + 2 * PAGE
    parts = []
    for part, piece in rows.pieces(at_once(query.device, 8 * query.shape[1] * longest)):
        scored = score_every_key(query[part].to(wide(query.dtype)), cache, piece, scale)
        left = _unselected(
            selection.indices[part], scored.scores.shape[-1], scored.position[..., :1]
        )
        rest = scored.scores.masked_fill(~left[:, :, None], -torch.inf).logsumexp(-1)
        parts.append(torch.sigmoid(lse[part] - rest.flatten(1)))
    return torch.cat(parts)


def rest_of(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Choice:
    """Judge a selection made elsewhere (a fixed pattern's): estimate the mass it leaves out.

    From the codes of the keys; the recent window is scored exactly.
    """
    each = (8 * query.shape[1] + cache.kv_heads * cache.head_dim) * int(rows.visible.max())
    parts = []
    for part, piece in rows.pieces(at_once(query.device, each)):
        own = query[part]
        found = estimate_masses(own, cache, piece, scale)
        left = _unselected(selection.indices[part], found.mass.shape[-1], found.first * PAGE)
        coded = (found.mass @ left.to(found.mass.dtype)[..., None]).squeeze(-1)
        position = recent_positions(piece, cache.kv_heads)
        recent = scores_at(own, cache, piece, position, scale)  # [rows, kv_heads, group, 2 * 64]
        start = piece.recent_page[:, None, None] * PAGE
        left = _unselected(selection.indices[part], 2 * PAGE, start) & sees(position, piece)
        recent = recent.masked_fill(~left[:, :, None], -torch.inf).logsumexp(-1)
        parts.append(torch.logaddexp(coded.log() + found.peak, recent).flatten(1))
    return Choice(selection, torch.cat(parts))


def _unselected(taken: Tensor, width: int, start: Tensor | int) -> Tensor:
    """Which of the `width` positions from `start` on are not among `taken`.

    Args:
        taken: int64 [rows, kv_heads, capacity], -1 where there is none.
        width: how many positions.
        start: int64 [rows, 1, 1], or one for all rows.

    Returns:
        bool [rows, kv_heads, width].
    """
    column = taken - start
    column = torch.where((taken >= 0) & (column >= 0) & (column < width), column, width)
    # One column more takes the writes of what lies elsewhere.
    left = torch.ones(*taken.shape[:2], width + 1, dtype=torch.bool, device=taken.device)
    return left.scatter_(2, column, False)[..., :-1]
