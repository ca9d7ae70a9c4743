"""What the keys' codes say of each row's attention: an estimated mass for every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.gpu.recent import score_recent
from kernels.gpu.scan import scan
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


@dataclass(frozen=True, slots=True)
class Masses:
    """Log-masses of the keys: estimated in front of a row's recent window, exact in it."""

    scores: Tensor  # float32 [rows, kv_heads, group, keys]  of the coded pages; -inf if not seen
    page_lse: Tensor  # float32 [rows, kv_heads, group, pages]
    near: Tensor  # float32 [rows, kv_heads, group, 128]  of the recent window
    starts: Tensor  # int64 [rows]  first key that a row sees
    stops: Tensor  # int64 [rows]  where its recent window begins
    lengths: Tensor  # int64 [rows]  where its keys end
    first: int  # position of the first of `scores`

    @property
    def keys(self) -> int:
        """Of the coded pages, those of all rows."""
        return self.scores.shape[-1]


def estimate_masses(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> Masses:
    """Estimate e ** score of every coded key; arguments as in `dynamic.select`."""
    query = query.contiguous()
    recent = rows.recent_page
    # The one wait for the device: how much the tensors have to hold.
    first, last = torch.stack((rows.starts.min() // PAGE, recent.max())).tolist()
    stops = recent * PAGE
    near = score_recent(query, cache, rows, stops, scale)
    scores = page_lse = near.new_empty(*near.shape[:3], 0)
    if last > first:
        scores, page_lse = (
            part.view(*near.shape[:3], -1)
            for part in scan(query, cache, rows, stops, first, last, scale)
        )
    return Masses(scores, page_lse, near, rows.starts, stops, rows.lengths, first * PAGE)
