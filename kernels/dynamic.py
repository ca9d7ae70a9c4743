"""Dynamic selection: score keys, cheaply where there are many, and keep the mass.

A short context is scored key by key. In a longer one the keys' codes (`kernels.codes`) name the
candidates that are (`kernels.candidates`), and the others are known by their estimated mass alone.
The budget (`kernels.budget`) then keeps the fewest keys whose share of all mass reaches the target,
and the others count through the means of their pages (`kernels.remainder`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels.attention import Impl
from kernels.budget import cut_by_mass
from kernels.page import PAGE
from kernels.remainder import mean_value
from kernels.scores import Scored, score_every_key, score_likely_keys
from kernels.selection import Selection
from kernels.timing import Phases
from kernels.torch_backend import at_once, scan_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection and what it leaves out."""

    selection: Selection
    log_rest: Tensor  # [rows, heads]  log of the estimated mass that was not selected
    rest: Tensor | None = None  # [rows, heads, head_dim]  the mean value of what was not, if wanted
    draws: int = 0  # values read to correct it, a row and KV head

    def read(self, visible: Tensor) -> Tensor:
        """int64 [rows, kv_heads], keys that are read, of so many `visible` [rows] ones."""
        counts = self.selection.counts
        return counts + (visible[:, None] - counts).clamp_max(self.draws)

    def coverage(self, lse: Tensor) -> Tensor:
        """Estimated share of the attention mass on the selected keys, [rows, heads].

        Args:
            lse: [rows, heads], log-sum-exp of attention over the selection. A nan anywhere in
                the scores shows as nan here.
        """
        return torch.sigmoid(lse - self.log_rest)

    def complete(self, output: Tensor, coverage: Tensor) -> Tensor:
        """Attention over the selection and, where it was wanted, the remainder.

        Args:
            output: [rows, heads, head_dim], attention over the selection.
            coverage: [rows, heads], the selection's.
        """
        if self.rest is None:
            return output
        share = coverage[..., None]  # [rows, heads, 1]
        return (output.to(share.dtype) * share + self.rest * (1 - share)).to(output.dtype)


def select(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases | None = None,
    impl: Impl = Impl.TORCH,
) -> Choice:
    """Choose the keys of each row by content.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.
        impl: backend. Budgets that none of Triton's programs can hold (more than 16,384 keys)
            go through torch's operations under it too.

    Returns:
        The choice; the recent window (64 to 127 keys) and the visible sinks are always in it. It
        depends on a row's own keys and position alone, never on other rows or on chunk sizes, but
        for the order in which a GPU's programs add.
    """
    run = partial(_select, policy=policy, scale=scale, phases=phases or Phases(), impl=impl)
    visible = (rows.lengths - rows.starts).tolist()
    whole = [policy.scores_all(keys) for keys in visible]
    if len(set(whole)) == 1:
        return run(query, cache, rows, keys=max(visible), whole=whole[0])
    # Short contexts must not pay for a long one in their company: each kind on its own.
    parts, places = [], []
    for kind in (True, False):
        some = [row for row, is_whole in enumerate(whole) if is_whole is kind]
        place = torch.tensor(some, device=query.device)
        most = max(visible[row] for row in some)
        own = rows.only(place)
        parts.append(run(query[place], cache, own, keys=most, whole=kind))
        places.append(place)
    joined = _join(parts)
    order = torch.cat(places).argsort()
    selection = Selection(joined.selection.indices[order], joined.selection.counts[order])
    rest = None if joined.rest is None else joined.rest[order]
    return Choice(selection, joined.log_rest[order], rest, joined.draws)


def _select(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases,
    impl: Impl,
    *,
    keys: int,
    whole: bool,
) -> Choice:
    """`select` for rows of one kind, scored `whole` or in two levels, of at most `keys` keys."""
    fused = _fused(impl, policy, keys)
    if fused is not None:
        each = scan_bytes(query.shape[1], keys) + policy.draws * query.shape[1] * cache.head_dim
        together = at_once(query.device, each)
        if impl is Impl.TRITON:
            from kernels.gpu.select import at_once as at_once_on_gpu

            together = at_once_on_gpu(rows, each)
        return _join(
            [
                Choice(
                    *fused(query[part], cache, piece, policy, scale, phases, whole=whole),
                    policy.draws if policy.remainder else 0,
                )
                for part, piece in rows.pieces(together)
            ]
        )
    drawn = policy.draws * cache.kv_heads * cache.head_dim  # values of a row
    each = 8 * (query.shape[1] * keys + drawn)  # bytes of its scores and their exponentials,
    if not whole:  # or the copies of its candidates' keys and, for a sequence, of the codes
        each += cache.kv_heads * cache.head_dim * query.itemsize * policy.candidates
        each += cache.kv_heads * cache.head_dim * query.itemsize * keys // rows.queries
    parts = []
    for part, piece in rows.pieces(at_once(query.device, each)):
        with phases.time("score", query.device):
            if whole:
                scored = score_every_key(query[part], cache, piece, scale)
            else:
                scored = score_likely_keys(query[part], cache, piece, policy, scale)
        with phases.time("select", query.device):
            parts.append(_choose(scored, cache, piece, policy))
    return _join(parts)


def _fused(
    impl: Impl, policy: Dynamic, keys: int
) -> Callable[..., tuple[Selection, Tensor, Tensor | None]] | None:
    """A backend's own choice among at most `keys` keys, where it has one."""
    if impl is Impl.NUMBA:
        from kernels.cpu.select import select as select_on_cpu  # numba takes a moment

        return select_on_cpu
    if impl is Impl.TRITON:
        from kernels.gpu.select import fits, select  # a CPU has no Triton

        return select if fits(policy, keys) else None
    return None


def _choose(scored: Scored, cache: LayerCache, rows: Rows, policy: Dynamic) -> Choice:
    """Spend the budget on the candidates."""
    peak = torch.maximum(scored.scores.amax(-1), scored.others)  # [rows, kv_heads, group]
    mass = (scored.scores - peak[..., None]).exp()  # [rows, kv_heads, group, candidates]
    outer = (scored.others - peak).exp()  # [rows, kv_heads, group]
    # The mean over the group of each head's share, as one product.
    weight = 1 / (mass.sum(-1) + outer) / mass.shape[2]  # [rows, kv_heads, group]
    importance = (weight[:, :, None] @ mass).squeeze(2)  # [rows, kv_heads, candidates]
    recent = scored.position >= rows.recent_page[:, None, None] * PAGE
    kept = scored.visible & ((scored.position < policy.sinks) | recent)
    kept, visible = (x.expand(importance.shape) for x in (kept, scored.visible))
    chosen = cut_by_mass(importance, kept, visible, rows.visible, policy)
    left_out = (~chosen).to(mass.dtype)[..., None]  # [rows, kv_heads, candidates, 1]
    inner = (mass @ left_out).squeeze(-1)  # [rows, kv_heads, group]
    log_rest = (inner + outer).log() + peak
    selection = Selection.from_mask(chosen, scored.position)
    if not policy.remainder:
        return Choice(selection, log_rest.flatten(1))
    if scored.masses is not None:
        mass, page_mass = scored.masses.mass, scored.masses.page_mass
        start = rows.starts.new_full((rows.sequences,), scored.masses.first)
    else:
        page_mass = mass.view(*mass.shape[:3], -1, PAGE).sum(-1)
        start = scored.position.view(rows.sequences, rows.queries, -1)[:, 0, 0] // PAGE
    rest = mean_value(mass, page_mass, start, cache, rows, selection, policy.draws)
    return Choice(selection, log_rest.flatten(1), rest, policy.draws)


def _join(parts: list[Choice]) -> Choice:
    if len(parts) == 1:
        return parts[0]
    indices = [part.selection.indices for part in parts]
    capacity = max(one.shape[2] for one in indices)
    padded = [F.pad(one, (0, capacity - one.shape[2]), value=-1) for one in indices]
    counts = torch.cat([part.selection.counts for part in parts])
    log_rest = torch.cat([part.log_rest for part in parts])
    rests = [part.rest for part in parts if part.rest is not None]
    rest = torch.cat(rests) if rests else None  # all have one, or none has
    return Choice(Selection(torch.cat(padded), counts), log_rest, rest, parts[0].draws)
