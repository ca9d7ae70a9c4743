"""One-bit codes of keys: what is read of every key to know which are worth reading whole.

A key is coded once its page is full. From the key k the centre m of its page is taken away, the
rest is rotated at random, x = R (k - m), and kept are the signs of x and one scale, s = |x|^2 /
|x|_1. With the signs b, <q, k> is estimated as <q, m> + s <R q, b>: RaBitQ's estimator (Gao and
Long 2024, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound"). Its error
is unbiased and nearly normal, and its variance is known beforehand: (1 - 2 / pi) |q|^2 s^2, and
(1 - 2 / pi) <q, q'> s^2 is the covariance for two queries q and q'.

The centre is the mean of the page's keys in 8 bits a channel (float8 e4m3): what rounding takes
from it is part of the rest, and so of the codes. A scale has 8 bits, too: rounding changes it by 6%
at the most, by 2.6% on average, where signs alone leave an error of 60%.

Codes and scales of a page lie by fours, of keys 8 apart: a word of 32 signs of each of the four,
then the next word of the same, and so on; then the next four's. A GPU's lane takes four words at
once, and its neighbours what lies beside them (`kernels.gpu.lanes`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

NOISE = 1 - 2 / math.pi
"""Variance of an estimate over |q|^2 s^2: what signs alone lose of a rotated vector."""
WORD = 32
"""Signs that share an int32."""
FOURS = PAGE // 4
"""Fours of keys of a page."""
SEED = 0
"""Of the rotation."""
FLOAT8 = torch.float8_e4m3fn
"""Of centres and scales: a sign, 4 bits of exponent, 3 of mantissa, and no infinity."""
MOST = 448.0
"""The greatest number of 8 bits, and so the greatest scale."""
FARTHEST = 256.0
"""A centre's greatest channel: where one key draws its page's mean away, the others keep scales."""


def words(head_dim: int) -> int:
    """int32 words of one key's code: an even number."""
    return 2 * -(-head_dim // (2 * WORD))


def by_fours(x: Tensor) -> Tensor:
    """What belongs to a page's keys [..., 64] in the order of their codes: [..., 16, 4]."""
    return x.reshape(*x.shape[:-1], 2, 4, 8).transpose(-1, -2).flatten(-3, -2)


def by_keys(x: Tensor) -> Tensor:
    """What is stored of a page's keys [..., 16, 4], key by key: [..., 64]."""
    return x.reshape(*x.shape[:-2], 2, 8, 4).transpose(-1, -2).flatten(-3)


_GATHER_BITS = sum(1 << 56 - 7 * bit for bit in range(8))


@lru_cache
def rotation(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The fixed random orthogonal matrix R, transposed: rows times it are rotated."""
    noise = torch.randn(
        head_dim, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)
    )
    orthogonal: Tensor = torch.linalg.qr(noise).Q
    return orthogonal.to(device, dtype).contiguous()  # [head_dim, head_dim]


def stored_centre(mean: Tensor) -> Tensor:
    """Pages' means as they are stored: float8 of any shape."""
    return mean.clamp(-FARTHEST, FARTHEST).to(FLOAT8)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: float8 of any shape.

    One that is too great, or no number, is none: its key is then read for certain.
    """
    return torch.where(scale <= MOST, scale, torch.nan).to(FLOAT8)


def encode(keys: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Code full pages.

    Args:
        keys: [..., 64, head_dim], float32 or float64.
        centre: [..., head_dim], as it is stored.

    Returns:
        The signs int32 [..., 16, words, 4] (bit i of word w is set where channel 32 w + i is not
        negative) and the scales, float32 [..., 16, 4].
    """
    rest = keys - centre.to(keys.dtype)[..., None, :]
    turned = rest @ rotation(keys.shape[-1], keys.dtype, keys.device)  # [..., 64, head_dim]
    scale = turned.square().sum(-1) / turned.abs().sum(-1).clamp_min(1e-30)
    width = words(keys.shape[-1]) * WORD
    bits = F.pad(turned >= 0, (0, width - keys.shape[-1]))  # [..., 64, width]
    # The product's last byte has the eight bytes of a word, 0 or 1 each, for its bits.
    octets = (bits.view(torch.int64) * _GATHER_BITS >> 56).to(torch.uint8)
    signs = octets.view(torch.int32).transpose(-1, -2)  # [..., words, 64]
    return by_fours(signs).transpose(-2, -3), by_fours(scale.float())


def estimate(query: Tensor, cache: LayerCache, rows: Rows, first: int, last: int) -> Tensor:
    """Estimate the masses of the keys in pages `first` to `last` of every row's sequence.

    e ** error is more than 1 on average: half of the error's variance is taken off each score, so
    that e ** score is unbiased.

    Args:
        query: [rows, heads, head_dim], scaled.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        first: the first page.
        last: the page behind the last; what an incomplete page gives is of no meaning.

    Returns:
        [rows, kv_heads, group, keys] scores.
    """
    count, heads, head_dim = query.shape
    kv_heads, sequences, queries = cache.kv_heads, rows.sequences, rows.queries
    group, dtype = heads // kv_heads, cache.kv.dtype
    tables = rows.block_tables[:, first:last]  # [sequences, pages]
    # All queries of a sequence and KV head side by side: [kv_heads, sequences, queries * group, d]
    grouped = query.view(sequences, queries, kv_heads, group, head_dim).permute(2, 0, 1, 3, 4)
    grouped = grouped.reshape(kv_heads, sequences, -1, head_dim)
    turned = grouped @ rotation(head_dim, query.dtype, query.device)
    penalty = grouped.square().sum(-1) * (NOISE / 2)  # [kv_heads, sequences, queries * group]
    centres = cache.of_pages(cache.centre, tables)  # [kv_heads * sequences, pages, head_dim]
    # Centres first: the other way round a CPU copies them.
    centre = torch.bmm(centres.to(dtype), grouped.to(dtype).flatten(0, 1).mT).to(query.dtype).mT
    centre = centre.reshape(*penalty.shape, -1)  # [kv_heads, sequences, queries * group, pages]
    signs = signs_of(cache.codes[:, tables], dtype, head_dim)
    scale = by_keys(cache.scale[:, tables].to(query.dtype))[:, :, None]
    # [kv_heads, sequences, 1, pages, 64]
    scores = (turned.to(dtype) @ signs.mT).to(query.dtype).view(*centre.shape, PAGE)
    scores = scores.sub_(penalty[..., None, None] * scale).mul_(scale).add_(centre[..., None])
    scores = scores.view(kv_heads, sequences, queries, group, -1)
    return scores.permute(1, 2, 0, 3, 4).reshape(count, kv_heads, group, -1)


def signs_of(codes: Tensor, dtype: torch.dtype, head_dim: int) -> Tensor:
    """Codes [..., pages, 16, words, 4] as 1 and -1: [..., pages * 64, head_dim]."""
    keys = by_keys(codes.transpose(-2, -3)).transpose(-1, -2)  # [..., pages, 64, words]
    # A clone, since of no pages everything is contiguous whatever its strides.
    octets = keys.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # little-endian
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = ((octets[..., None] >> place) & 1).flatten(-2)[..., :head_dim]
    return bits.to(dtype).mul_(2).sub_(1).flatten(-3, -2)
