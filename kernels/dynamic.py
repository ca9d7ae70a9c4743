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

from kernels.attention import Impl
from kernels.budget import SAMPLE, wanted_keys
from kernels.masses import estimate_masses
from kernels.sample import draw, log_weight, uniform
from kernels.selection import Selection
from kernels.timing import Phases
from kernels.torch_backend import at_once, scan_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.masses import Masses
    from kernels.policy import Dynamic


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection and the estimated mass that it does not stand for.

    Of a sample that is what its weights leave of all keys' estimates: nothing on average, and known
    where the sample happens to be too light or too heavy. Estimates of all keys and exact masses of
    some are so joined without bias (the difference estimator of survey sampling).
    """

    selection: Selection
    missing: Tensor  # [rows, heads]  in units of e ** unit; of a sample it may be negative
    unit: Tensor  # [rows, heads]

    def coverage(self, lse: Tensor, own: Tensor) -> Tensor:
        """Estimated share of the attention mass on the selected keys, [rows, heads].

        Args:
            lse: [rows, heads], log-sum-exp of attention over the selection, weights included.
            own: [rows, heads], the same without weights. A nan anywhere in the scores shows as nan
                here.
        """
        peak = torch.maximum(lse, self.unit)
        carried = (own - peak).exp()
        whole = (lse - peak).exp() + self.missing * (self.unit - peak).exp()
        return carried / torch.maximum(whole, carried).clamp_min(1e-30)


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
        impl: backend.

    Returns:
        The choice; the recent window (64 to 127 keys) and the visible sinks are always in it. It
        depends on a row's own keys and position alone, never on other rows or on chunk sizes, but
        for rounding: into how many programs a GPU's sums are split depends on the batch.
    """
    phases = phases or Phases()
    fused = _fused(impl)
    keys = int(rows.visible.max())
    each = scan_bytes(query.shape[1], keys)
    if fused is None:  # the codes of a sequence are unpacked
        each += cache.kv_heads * cache.head_dim * query.itemsize * keys // rows.queries
    together = at_once(query.device, each)
    if impl is Impl.TRITON and bool(rows.starts.any()):
        # A window moves the first key: scores span the keys of all rows.
        together = min(together, rows.queries)
    run = fused or _select
    return _join(
        [
            run(query[part], cache, piece, policy, scale, phases)
            for part, piece in rows.pieces(together)
        ]
    )


def _fused(impl: Impl) -> Callable[..., Choice] | None:
    """A backend's own choice, where it has one."""
    if impl is Impl.NUMBA:
        from kernels.cpu.select import select as select_on_cpu  # numba takes a moment

        return select_on_cpu
    if impl is Impl.TRITON:
        from kernels.gpu.select import select as select_on_gpu  # a CPU has no Triton

        return select_on_gpu
    return None


def _select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases
) -> Choice:
    """`select` in torch's operations."""
    with phases.time("score", query.device):
        found = estimate_masses(query, cache, rows, scale)
    with phases.time("select", query.device):
        return _choose(found, rows, policy)


def _choose(found: Masses, rows: Rows, policy: Dynamic) -> Choice:
    """Spend the budget."""
    sinks = found.position < policy.sinks  # [keys]
    share = found.mass.mean(2)  # [rows, kv_heads, keys]  over the group's heads
    free = (found.coded & ~sinks)[:, None].expand(share.shape)
    certain = (found.coded & sinks)[:, None].expand(share.shape)
    held = (share * sinks).sum(-1) + found.near.mean(2).sum(-1)  # [rows, kv_heads]
    always = certain.sum(-1) + found.seen.sum(-1)[:, None]
    share = share.masked_fill(~free, -1.0)
    wanted = wanted_keys(share, held, always, rows.visible, policy)
    number = uniform(found.position, share.shape[1]).to(share.dtype)
    number = number if policy.sampled else torch.ones_like(number)
    drawn, threshold = draw(share, number, wanted, max(policy.max_keys, SAMPLE))
    chosen = drawn | certain
    weight = log_weight(share, threshold).masked_fill_(~drawn, 0.0) if policy.sampled else None
    stands = chosen.to(share.dtype)  # [rows, kv_heads, keys]  for so many keys
    if weight is not None:
        stands *= weight.exp()
    left = (found.mass @ (1 - stands)[..., None]).squeeze(-1)  # [rows, kv_heads, group]
    late = found.seen[:, None].expand(-1, share.shape[1], -1)
    mask = torch.cat((chosen, late), dim=-1)
    position = torch.cat(
        (found.position.expand(len(found.recent), -1), found.recent), dim=-1
    )  # [rows, keys + 2 * 64]
    if weight is not None:
        weight = F.pad(weight, (0, late.shape[-1]))
    selection = Selection.from_mask(mask, position[:, None], weight)
    return Choice(selection, left.flatten(1), found.unit.flatten(1))


def _join(parts: list[Choice]) -> Choice:
    if len(parts) == 1:
        return parts[0]
    some = [part.selection for part in parts]
    capacity = max(one.indices.shape[2] for one in some)

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        ends = (capacity - one.shape[2] for one in tensors)
        return torch.cat(
            [F.pad(one, (0, end), value=value) for one, end in zip(tensors, ends, strict=True)]
        )

    weights = [one.log_weight for one in some if one.log_weight is not None]
    selection = Selection(
        padded([one.indices for one in some], -1),
        torch.cat([one.counts for one in some]),
        padded(weights, 0) if weights else None,  # all have them, or none has
    )
    missing, unit = (torch.cat([getattr(part, n) for part in parts]) for n in ("missing", "unit"))
    return Choice(selection, missing, unit)
