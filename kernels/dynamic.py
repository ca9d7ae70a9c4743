"""Dynamic selection: every key is scored cheaply, a few are drawn and read, and stand for all.

A key's code (`kernels.codes`) says what share of the attention mass it carries, about. The shares
say how many keys a row should read (`kernels.budget`), and these are drawn by them
(`kernels.sample`): keys that carry much are read for certain, and of the others each that is read
stands for several. Sinks and the recent window are always read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import judge
from kernels.attention import Impl, selected_attention
from kernels.budget import marks, probed
from kernels.masses import estimate_masses
from kernels.page import PAGE
from kernels.sample import greatest, lengths, log_weight, marked
from kernels.selection import Selection
from kernels.timing import Phases
from kernels.torch_selected import at_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.masses import Masses
    from kernels.policy import Dynamic


def select(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases | None = None,
    impl: Impl = Impl.TORCH,
) -> Selection:
    """Choose the keys of each row by content.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.
        impl: backend.

    Returns:
        The keys; the recent window (64 to 127 keys) and the visible sinks are always among them.
        They depend on a row's own keys and position alone, never on other rows or on chunk sizes,
        but for rounding.
    """
    phases = phases or Phases()
    fused = _fused(impl, policy)
    keys = int(rows.visible.max())
    each = 8 * query.shape[1] * keys  # scores, and what is ranked of them
    if fused is None:  # the codes of a sequence are unpacked
        each += cache.kv_heads * cache.head_dim * query.itemsize * keys // rows.queries
    run = fused or _select
    return Selection.join(
        [
            run(query[part], cache, piece, policy, scale, phases)
            for part, piece in rows.pieces(at_once(query.device, each))
        ]
    )


@dataclass(frozen=True, slots=True)
class Attended:
    """What rows that select by content found."""

    output: Tensor  # [rows, heads, head_dim]  of the query's dtype
    lse: Tensor  # [rows, heads]  log-sum-exp of attention over the selection, weights included
    own: Tensor  # [rows, heads]  likewise without weights
    coverage: Tensor  # [rows, heads]  estimated share of the mass on the selected keys
    keys: Tensor  # [rows, kv_heads]  keys read
    selection: Selection | None  # None where a backend reads the keys as it finds them


def attend(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases | None = None,
    impl: Impl = Impl.TORCH,
) -> Attended:
    """Select by content and attend to what is selected; arguments as in `select`.

    A nan in the scores shows as nan in the coverage.
    """
    phases = phases or Phases()
    if impl is Impl.TRITON and policy.sampled:
        from kernels.gpu.decode import attend as attend_on_gpu  # a CPU has no Triton

        return attend_on_gpu(query, cache, rows, policy, scale, phases)
    selection = select(query, cache, rows, policy, scale, phases, impl)
    with phases.time("attend", query.device):
        output, lse, own = selected_attention(query, cache, rows, selection, scale, impl)
    coverage = judge.estimated_coverage(query, cache, rows, selection, lse, own, scale, impl)
    return Attended(output, lse, own, coverage, selection.counts, selection)


def _fused(impl: Impl, policy: Dynamic) -> Callable[..., Selection] | None:
    """A backend's own selection, where it has one; plain top-k is for comparison only."""
    if impl is Impl.NUMBA and policy.sampled:
        from kernels.cpu.select import select as select_on_cpu  # numba takes a moment

        return select_on_cpu
    if impl is Impl.TRITON:
        from kernels.gpu.select import select as select_on_gpu  # a CPU has no Triton

        return select_on_gpu
    return None


def _select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Selection:
    """`select` in torch's operations."""
    with phases.time("score", query.device):
        found = estimate_masses(query, cache, rows, policy.sinks, scale)
    with phases.time("select", query.device):
        return _choose(found, rows, policy)


def _choose(found: Masses, rows: Rows, policy: Dynamic) -> Selection:
    """Spend the budget."""
    share = found.shares()  # [rows, kv_heads, keys]
    always = found.seen.sum(-1)  # [rows]
    page, pages = found.first // PAGE, share.shape[-1] // PAGE
    position, there = probed(page, pages, rows.visible)
    some = share[..., position].masked_fill(~there[:, None], 0.0)
    number = marks(some, found.held_share(), always, rows.visible, policy)  # [rows, kv_heads]
    if policy.sampled:
        # No more marks than keys: then all are read.
        enough = number >= found.free.sum(-1)[:, None]
        length = lengths(share, number, everything=enough) * found.free[:, None]
        chosen, weight = marked(length, page), log_weight(length).float()
        weight = F.pad(weight, (policy.sinks, 2 * PAGE))
        # Nothing is drawn where no share is known, and the keys always read may all be finite.
        weight = weight.masked_fill((found.lost() & ~enough)[..., None], torch.nan)
    else:
        chosen, weight = greatest(share, found.free, number), None
    # Sinks, what was chosen, the recent window: positions ascend.
    sinks, (rows_, kv_heads, keys) = policy.sinks, share.shape
    seen = found.seen[:, None].expand(-1, kv_heads, -1)
    mask = torch.cat((seen[..., :sinks], chosen, seen[..., sinks:]), dim=-1)
    position = (torch.arange(keys, device=share.device) + found.first).expand(rows_, -1)
    position = torch.cat((found.kept[:, :sinks], position, found.kept[:, sinks:]), dim=-1)
    return Selection.from_mask(mask, position[:, None], weight)
