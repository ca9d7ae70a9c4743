"""What attention would have read of the keys that were not selected: their pages' mean values.

Spread attention moves no single key much, and all of them together a lot: a head that averages over
a whole document is far from its average when it reads the few best keys alone. The mass of the
unselected keys is known page by page, and so is the mean of each page's values: the sum of one
times the other stands in for the values that were not read. It is exact where the mass within a
page does not depend on the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.draws import correction
from kernels.page import PAGE, PAGE_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


def mean_value(
    mass: Tensor,
    page_mass: Tensor,
    first: Tensor,
    cache: LayerCache,
    rows: Rows,
    selection: Selection,
    draws: int = 0,
) -> Tensor:
    """The mean value of the keys that were not selected, weighted with their mass.

    Args:
        mass: [rows, kv_heads, group, pages * 64], mass of each key; 0 where a row does not see it.
        page_mass: [rows, kv_heads, group, pages], its sums.
        first: int64 [sequences], the page that the masses begin with.
        cache: the layer's paged cache; pages in which a key is left out are complete.
        rows: where each row's keys lie.
        selection: what was selected.
        draws: so many unselected values correct the pages' means (`kernels.draws`).

    Returns:
        [rows, heads, head_dim], of the masses' dtype; 0 where nothing was left out.
    """
    count, kv_heads, group, keys = mass.shape
    sequences, queries = rows.sequences, rows.queries
    if keys == 0:
        return mass.new_zeros(count, kv_heads * group, cache.head_dim)
    offset = selection.indices - first.repeat_interleave(queries)[:, None, None] * PAGE
    inside = (offset >= 0) & (offset < keys)  # [rows, kv_heads, capacity]
    offset = offset.clamp(0, keys - 1)[:, :, None].expand(-1, -1, group, -1)
    taken = mass.gather(-1, offset) * inside[:, :, None]
    left = page_mass.scatter_add(-1, offset >> PAGE_BITS, -taken).clamp_min_(0)
    # The recent window is always selected whole. What rounding leaves of its mass must not meet the
    # means of its pages, which are not written yet.
    recent = rows.recent_page - first.repeat_interleave(queries)
    place = torch.arange(left.shape[-1], device=first.device)
    left.masked_fill_((place >= recent[:, None])[:, None, None], 0.0)
    left /= left.sum(-1, keepdim=True).clamp_min(1e-30)
    # All queries of a sequence and KV head side by side: [kv_heads, sequences, queries * group, ..]
    left = left.view(sequences, queries, kv_heads, group, -1).permute(2, 0, 1, 3, 4)
    left = left.reshape(kv_heads, sequences, queries * group, -1)
    page = first[:, None] + place  # [sequences, pages]
    table = rows.block_tables.gather(1, page.clamp_max(rows.block_tables.shape[1] - 1))
    values = cache.of_pages(cache.value_mean, table)  # [kv_heads * sequences, pages, head_dim]
    mean = torch.bmm(left.flatten(0, 1).to(values.dtype), values).to(mass.dtype)
    mean = mean.view(kv_heads, sequences, queries, group, -1)
    mean = mean.permute(1, 2, 0, 3, 4).reshape(count, kv_heads * group, -1)
    if draws:
        share = mass.scatter_add(-1, offset, -taken).clamp_min_(0)
        unread = torch.arange(keys, device=first.device) >= recent[:, None] * PAGE
        share = share.masked_fill_(unread[:, None, None], 0.0)
        share /= share.sum(-1, keepdim=True).clamp_min(1e-30)
        mean += correction(share, first, cache, rows, draws)
    return mean
