"""The keys of a row: sinks, those that may be drawn, the recent window, one behind the other."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.page import PAGE

NEAR = 2 * PAGE
"""Keys of the recent window, those included that are not written yet."""


@triton.jit
def edges(starts, stops, lengths, row):
    """The first key that a row sees, the first of its recent window, and the end of its keys."""
    start, stop = tl.load(starts + row).to(tl.int32), tl.load(stops + row).to(tl.int32)
    return start, stop, tl.load(lengths + row).to(tl.int32)


@triton.jit
def amounts(start, stop, length, sinks):
    """How many keys are sinks, how many may be drawn, and how many the recent window has."""
    certain = tl.maximum(tl.minimum(stop, sinks) - start, 0)
    free = tl.maximum(stop - tl.maximum(start, sinks), 0)
    seen = tl.maximum(length - tl.maximum(start, stop), 0)
    return certain, free, seen
