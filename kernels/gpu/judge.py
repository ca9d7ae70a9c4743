"""The whole attention mass, estimated from the codes of all keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.gpu.decode import look_over
from kernels.gpu.prepare import LOG2E
from kernels.gpu.scan import scan
from kernels.page import PAGE
from kernels.policy import Dynamic

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


def log_mass(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> Tensor:
    """Log of each row's attention mass: the recent window's exactly, the rest by the codes.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        scale: factor on the scores.

    Returns:
        float32 [rows, heads].
    """
    query, policy = query.contiguous(), Dynamic(sinks=PAGE)
    layout, scratch = look_over(query, cache, rows, policy, scale)
    coded = torch.empty(layout.lines, layout.spans, layout.padded, device=query.device)
    scan(query, cache, rows, policy.sinks, scale, layout, scratch, masses=coded)
    heads = slice(0, layout.group)
    free = coded[..., heads].sum(1).log2() + scratch.norm[:, heads]  # [lines, group]
    held = scratch.held[:, heads] / LOG2E.value  # [lines, group, HELD]
    mass = torch.logaddexp(free / LOG2E.value, held.logsumexp(-1))
    return mass.view(query.shape[:2])
