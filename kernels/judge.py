"""How much of the attention mass a selection carries, whoever made it: exactly, or estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.attention import Impl, dense_decode
from kernels.dynamic import Choice
from kernels.masses import estimate_masses
from kernels.page import PAGE
from kernels.scores import score_every_key
from kernels.selection import unselected
from kernels.torch_backend import at_once, scan_bytes, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


def true_coverage(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    selection: Selection,
    own: Tensor,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> Tensor:
    """Share of the attention mass that a selection carries: every key is read, in float32.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        selection: the keys each row attends to.
        own: [rows, heads], log-sum-exp of attention over the selected keys, each counted once.
        scale: factor on the scores.
        impl: backend.

    Returns:
        [rows, heads], 0 to 1.
    """
    if impl is Impl.TRITON:
        return (own - dense_decode(query, cache, rows, scale, impl)[1]).exp().clamp_max(1)
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


def rest_of(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    selection: Selection,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> Choice:
    """Judge a selection made elsewhere (a fixed pattern's): estimate the mass it leaves out.

    From the codes of the keys; the recent window is scored exactly.
    """
    if impl is Impl.TRITON:
        from kernels.gpu import select as gpu  # a CPU has no Triton

        each = scan_bytes(query.shape[1], int(rows.visible.max()))
        together = at_once(query.device, each)
        together = min(together, rows.queries) if bool(rows.starts.any()) else together
        lefts = [
            gpu.mass_left(query[part], cache, piece, selection.rows(part.start, part.stop), scale)
            for part, piece in rows.pieces(together)
        ]
        return _left(selection, torch.cat(lefts))
    if impl is Impl.NUMBA:
        from kernels.cpu.left import mass_left as mass_left_on_cpu  # numba takes a moment

        return _left(selection, mass_left_on_cpu(query, cache, rows, selection, scale))
    each = (8 * query.shape[1] + cache.kv_heads * cache.head_dim) * int(rows.visible.max())
    lefts = []
    for part, piece in rows.pieces(at_once(query.device, each)):
        found = estimate_masses(query[part], cache, piece, scale)
        some, start = selection.indices[part], piece.recent_page[:, None, None] * PAGE
        first = int(piece.starts.min()) // PAGE * PAGE
        coded = unselected(some, found.mass.shape[-1], first).to(found.mass.dtype)
        recent = unselected(some, 2 * PAGE, start).to(found.near.dtype)
        left = (found.mass @ coded[..., None] + found.near @ recent[..., None]).squeeze(-1)
        lefts.append((left.log() + found.unit).flatten(1))
    return _left(selection, torch.cat(lefts))


def _left(selection: Selection, log_rest: Tensor) -> Choice:
    """A selection and the log of what it leaves out [rows, heads]."""
    return Choice(selection, torch.ones_like(log_rest), log_rest)
