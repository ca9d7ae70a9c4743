"""A sample of the keys that stands for all of them: marks on a ruler.

Top-k alone is wrong where attention is spread: what the other keys would have added is lost, and no
few more keys bring it back. So keys are drawn instead, by their estimated share w of the attention
mass. Lay the keys side by side on a line, each as long as w, at most 1 / K; put a mark at every
1 / K of the line; and read the keys on which a mark falls. A key is then read with probability
p = min(1, K w): those that carry a K-th of the mass are certain, as in top-k, and each of the
others that is read stands for 1 / p of its kind. Sums over the keys that are read, with weights
1 / p, estimate sums over all keys without bias, whatever the error of w: the exact scores of the
keys that are read take its place, and w only decides who is read. Attention is the quotient of two
such sums, and nearly as good. At most K keys are read of shares that sum to 1, and fewer the more
of the mass lies on few keys. (Systematic sampling with probability proportional to size, Madow
1949, "On the Theory of Systematic Sampling, II"; the weights are those of Horvitz and Thompson
1952. Desai et al. 2025, "vAttention: Verified Sparse Attention", joins top-k and uniform samples.)

The line is laid out page by page, within a page 8 keys apart, so that a mark rarely meets the
neighbours of a key that is read. Lengths are whole numbers, so that sums of them are exact in any
order. Every `SEGMENT` pages a line of its own begins: a row's keys are the same whoever looks for
them, in how many parts at once. Where a line's first mark falls is fixed by its number and the KV
head: shares differ from one query to the next, so the same keys are not met twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

SEGMENT = 16
"""Pages of one line."""
BITS = 18
"""A line's unit is 2 ** -18 of the distance between marks: a whole line stays below 2 ** 29."""
STEP = 0x9E3779B9
"""2 ** 32 over the golden ratio: from one segment's first mark to the next one's."""
TURN = 0xC13FA9A9
"""From one KV head's to the next one's: 2 ** 32 over the plastic number (Roberts 2018)."""
STRIDE = 8
"""Neighbours on the line lie so many keys apart."""


def phases(first: int, segments: int, kv_heads: int, device: torch.device) -> Tensor:
    """How far in front of each line a mark would be, in its units: int64 [kv_heads, segments]."""
    segment = torch.arange(first, first + segments, device=device)
    head = torch.arange(kv_heads, device=device)[:, None]
    return (segment * STEP + head * TURN & 0xFFFF_FFFF) >> (32 - BITS)


def lengths(share: Tensor, marks: Tensor, everything: Tensor) -> Tensor:
    """The keys' lengths on the line.

    Args:
        share: [rows, kv_heads, keys], not negative. What is not a number is taken for the greatest.
        marks: [rows, kv_heads], K.
        everything: bool [rows, kv_heads], whether all keys are to be read.

    Returns:
        int64 of the shares' shape, in units of 2 ** -18 of the distance between marks.
    """
    part = (share * marks[..., None]).nan_to_num(nan=1.0).clamp_max(1.0)
    return (part.masked_fill(everything[..., None], 1.0) * (1 << BITS)).round().long()


def marked(length: Tensor, first: int) -> Tensor:
    """The keys on which a mark falls.

    Args:
        length: int64 [rows, kv_heads, pages * 64].
        first: the number of the first page, the beginning of a segment.

    Returns:
        bool of the same shape.
    """
    rows, kv_heads, keys = length.shape
    segments = -(-keys // (SEGMENT * PAGE))
    padded = F.pad(length, (0, segments * SEGMENT * PAGE - keys))
    # Within a page 0, 8, 16, ..., 1, 9, ...: each column of the page's 8 x 8 keys behind the other.
    line = padded.view(rows, kv_heads, -1, PAGE // STRIDE, STRIDE).transpose(-1, -2)
    line = line.reshape(rows, kv_heads, segments, SEGMENT * PAGE)
    start = phases(first // SEGMENT, segments, kv_heads, length.device)[..., None]
    end = line.cumsum(-1) + start
    hit = (end >> BITS) > ((end - line) >> BITS)
    hit = hit.view(rows, kv_heads, -1, STRIDE, PAGE // STRIDE).transpose(-1, -2)
    return hit.reshape(padded.shape)[..., :keys]


def log_weight(length: Tensor) -> Tensor:
    """The log of 1 / p, how many keys each marked one stands for: 0 for those that are certain."""
    return -(length.clamp_min(1).double() * 2.0**-BITS).log()


def greatest(share: Tensor, free: Tensor, number: Tensor) -> Tensor:
    """Plain top-k, for comparison: the greatest shares, ties going to the first.

    Args:
        share: [rows, kv_heads, keys]. What is not a number is the greatest.
        free: bool [rows, keys].
        number: int64 [rows, kv_heads], how many.

    Returns:
        bool [rows, kv_heads, keys].
    """
    share = share.nan_to_num(nan=torch.inf).masked_fill(~free[:, None], -1.0)
    number = torch.minimum(number, free.sum(-1)[:, None])[..., None]
    order = torch.sort(share, dim=-1, descending=True, stable=True).indices
    taken = (torch.arange(share.shape[-1], device=share.device) < number).expand(share.shape)
    return torch.zeros_like(taken).scatter_(-1, order, taken)
