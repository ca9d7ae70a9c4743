"""ALiBi: scores that fall with the distance between key and query (Press et al. 2022).

To the score of query i of head h and key j is added slope[h] * (j - i). A rotated key has its
position in its channels; a key under ALiBi has it only in its place in the cache, and so
`kernels.cache.LayerCache` says what a place is worth: `slopes`, one for each query head, bound by
the attention layer. Every op that scores keys of a cache adds their part.

Always the distance is multiplied, a difference of whole numbers, and the product added to a score
in float32 or wider. Softmax would allow slope * j as well, and that is linear in the position: it
could be channels more of queries and keys, and no kernel had to know of it. But at a million keys
slope * j is some 10 ** 5, of which float32 keeps three digits behind the point where keys near the
query differ by one slope; and bfloat16 numbers, of which three hold a position, are the largest of
a key's channels, from which its code and its page's spread would be made instead of its content.
slope * (j - i) is exact to 2 ** -24 of itself, and where it is large the key has no mass.

Of a page as a whole, whose keys are taken for alike, the log of the sum of e ** bias over its keys
stands where else log 64 does (`page_mass`); and since its keys do not weigh the same, its mean
stands for fewer of them (`page_evenness`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache


def bias_at(cache: LayerCache, position: Tensor, query: Tensor) -> Tensor:
    """What distance adds to scores.

    Args:
        cache: one with slopes.
        position: int64 [rows, 1 or kv_heads, n], of keys; whatever it is, the result is finite.
        query: int64 [rows], the rows' own positions.

    Returns:
        [rows, kv_heads, group, n] in the slopes' dtype.
    """
    slopes = of_groups(cache)  # [kv_heads, group]
    distance = (position - query[:, None, None]).to(slopes.dtype)  # exact up to 2 ** 24 in float32
    return slopes[:, :, None] * distance[:, :, None]


def of_groups(cache: LayerCache) -> Tensor:
    """The slopes by KV head, [kv_heads, group]."""
    assert cache.slopes is not None
    return cache.slopes.view(cache.kv_heads, -1)


def page_mass(slopes: Tensor) -> Tensor:
    """Log of the sum of e ** bias over a page's keys, for a query where the page begins.

    For query i and the page that begins with key j, slope * (j - i) is yet to be added.

    Args:
        slopes: [...].

    Returns:
        [...]; log 64 for a slope of 0.
    """
    place = torch.arange(PAGE, device=slopes.device)
    return (slopes[..., None] * place).logsumexp(-1)


def page_evenness(slopes: Tensor) -> Tensor:
    """How many keys of a page would weigh as unevenly as all do, over 64: 0 to 1.

    (sum w) ** 2 / (64 sum w ** 2) of the weights w = e ** bias (Kish 1965, the effective size of a
    sample); 1 for a slope of 0.

    Args:
        slopes: [...].
    """
    place = torch.arange(PAGE, device=slopes.device)
    bias = slopes[..., None] * place
    return (2 * bias.logsumexp(-1) - (2 * bias).logsumexp(-1)).exp() / PAGE
