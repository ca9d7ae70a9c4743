"""A few unselected keys, drawn by their mass, put right what the means of their pages say wrongly.

A page's mean value stands in for its unselected keys (`kernels.remainder`). That is wrong where the
mass within a page follows the values: a head that looks at all words of a kind finds other values
there than the page has on average. The error is a mean over the unselected mass, so that a sample
of the keys, drawn by their mass, estimates it without bias, whatever the values are. (Desai et al.
2025, "vAttention: Verified Sparse Attention", joins selection and sampling so; drawn here is only
the difference from the pages' means, which is small.)

Draws are at even steps of the cumulated mass, so they are the same every time and spread over the
context. A group's heads share them: drawn by the heads' mean mass, each head's weight corrects what
is another's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.page import PAGE, PAGE_BITS
from kernels.torch_backend import head_offsets

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


def correction(share: Tensor, first: Tensor, cache: LayerCache, rows: Rows, count: int) -> Tensor:
    """The mean difference between unselected values and their pages' means, by `count` draws.

    Args:
        share: [rows, kv_heads, group, pages * 64], each head's share of its unselected mass; it
            sums to 1, or to 0 where nothing is left out.
        first: int64 [sequences], the page that the shares begin with.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        count: draws a row and KV head.

    Returns:
        [rows, heads, head_dim], of the shares' dtype.
    """
    number, kv_heads, group, keys = share.shape
    mean = share.mean(2)  # [rows, kv_heads, keys]
    sums = mean.double().cumsum(-1)
    total = sums[..., -1:]  # [rows, kv_heads, 1]
    place = torch.searchsorted(sums, total * steps(count, share.device)).clamp_max_(keys - 1)
    position = place + first.repeat_interleave(rows.queries)[:, None, None] * PAGE
    last = rows.block_tables.shape[1] * PAGE - 1
    slots = rows.slots(position.clamp_max(last)) + head_offsets(cache, share.device)
    values = cache.kv.view(-1, 2, cache.head_dim)[slots, 1].to(share.dtype)
    means = cache.value_mean.view(-1, cache.head_dim)[slots >> PAGE_BITS].to(share.dtype)
    drawn = share.gather(-1, place[:, :, None].expand(-1, -1, group, -1))
    weight = drawn / mean.gather(-1, place)[:, :, None].clamp_min(1e-30)
    weight *= total[..., None].to(share.dtype) / count  # [rows, kv_heads, group, draws]
    return (weight @ (values - means)).view(number, kv_heads * group, -1)


def steps(count: int, device: torch.device) -> Tensor:
    """float64 [count], the middles of as many equal parts of 0 to 1."""
    return (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
