"""What distance takes from scores (`kernels.alibi`), in Triton's kernels.

Kernels take a pointer to the slopes and whether to read them, known when they are compiled: where
distance does not count, nothing is left of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache


def slopes_of(cache: LayerCache) -> Tensor:
    """float32 [heads]; a tensor that is not read where there are none."""
    return cache.spread if cache.slopes is None else cache.slopes


@triton.jit
def load_slopes(slopes, kv_head, head, GROUP: tl.constexpr):
    """Slopes to base 2 of the heads `head` of a KV head's group, 0 of those that are none."""
    slope = tl.load(slopes + kv_head * GROUP + head, head < GROUP, 0.0)
    return slope * 1.4426950408889634


@triton.jit
def bias_at(slope, key, query):
    """What distance adds to scores: of keys and queries at these positions, broadcast."""
    return slope * (key - query).to(tl.float32)


@triton.jit
def page_of_slope(slope, PAGE: tl.constexpr):
    """`kernels.alibi.page_mass` over log 64, to base 2, and `page_evenness`, by slopes [n]."""
    # By the distance to a page's last key: no power overflows.
    weight = tl.exp2(slope[:, None] * (tl.arange(0, PAGE) - (PAGE - 1))[None].to(tl.float32))
    total = tl.sum(weight, 1)
    mass = tl.log2(total / PAGE) + slope * (PAGE - 1)
    return mass, total * total / (PAGE * tl.sum(weight * weight, 1))
