"""A sample of the keys that stands for all of them: priority sampling.

Top-k alone is wrong where attention is spread: what the other keys would have added is lost, and no
few more keys bring it back. So keys are drawn instead, by their estimated share w of the attention
mass. Each has a fixed number u, as if drawn from 0 to 1, and the m keys of the greatest priority
w / u are read. With t the greatest priority that is not, a key was to be had with probability
p = min(1, w / t): those that carry much are certain, as in top-k, and each of the rest stands for
1 / p keys of its kind. Sums over the keys that are read, with weights 1 / p, estimate sums over all
keys, and over random numbers u without bias, whatever the error of w: the exact scores of the keys
that are read take its place, and w only decides who is read. Attention is the quotient of two such
sums, and nearly as good. (Duffield, Lund and Thorup 2007, "Priority sampling for
estimation of arbitrary subset sums"; the weights are those of Horvitz and Thompson 1952. Desai et
al. 2025, "vAttention: Verified Sparse Attention", joins top-k and uniform samples.)

The numbers u are multiples of the golden ratio, so that any run of positions has them spread
evenly, and the sample misses no part of a text. They are fixed, so what is periodic in a text can
meet them: keys that lie a Fibonacci number apart have nearly the same, and are read all or none
where each carries little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

STEP = 0x9E3779B9
"""2 ** 32 over the golden ratio: from one position's number to the next one's."""
TURN = 0xC13FA9A9
"""From one KV head's numbers to the next one's: 2 ** 32 over the plastic number (Roberts 2018)."""
BITS = 23
"""Of each number, so that float32 holds it."""


def uniform(positions: Tensor, kv_heads: int) -> Tensor:
    """The fixed number of each position and KV head, in (0, 1).

    Args:
        positions: int64 [keys].
        kv_heads: how many.

    Returns:
        float32 [kv_heads, keys].
    """
    head = torch.arange(kv_heads, device=positions.device)[:, None]
    whole = (positions * STEP + head * TURN) & 0xFFFF_FFFF
    return ((whole >> (32 - BITS)).float() + 0.5) * 2.0**-BITS


def draw(share: Tensor, number: Tensor, wanted: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The keys of the greatest priority, and what each of them stands for.

    Args:
        share: [rows, kv_heads, keys], not negative; -1 for keys that may not be drawn.
        number: [kv_heads, keys], see `uniform`; or 1 throughout, for the greatest shares.
        wanted: int64 [rows, kv_heads], how many; at most those that may be drawn.
        most: no row wants more.

    Returns:
        bool [rows, kv_heads, keys], who is read, ties going to the lowest position; and, of the
        shares' dtype, the threshold t [rows, kv_heads, 1], 0 where all are read.
    """
    priority = (share / number).nan_to_num(nan=torch.inf, posinf=torch.inf)
    ranked = priority.topk(min(most + 1, priority.shape[-1])).values
    ranked = torch.nn.functional.pad(ranked, (0, 1), value=-1.0)  # behind the last
    least = ranked.gather(-1, (wanted - 1).clamp_min(0)[..., None])
    above, level = priority > least, priority == least
    room = wanted[..., None] - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    threshold = ranked.gather(-1, wanted[..., None].clamp_max(ranked.shape[-1] - 1))
    return chosen & (wanted > 0)[..., None], threshold.clamp_min(0)


def log_weight(share: Tensor, threshold: Tensor) -> Tensor:
    """The log of 1 / p, how many keys each drawn one stands for: 0 for those that are certain."""
    return torch.where(share < threshold, (threshold / share).log(), 0.0)
