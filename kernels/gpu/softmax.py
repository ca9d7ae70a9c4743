"""Softmax over keys that come in pieces (FlashAttention's recurrence; Dao et al. 2022).

A row has the peak of its scores so far, the total of their masses over the peak's, and the values'
sums by these masses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(peak):
    """The peak, and 0 for that of no scores: nothing is added to infinity."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def raised(score, peak):
    """The peak with some more scores, and the same to be taken from scores."""
    higher = tl.maximum(peak, tl.max(score, 1))
    return higher, finite(higher)


@triton.jit
def add_scores(score, values, peak, total, sums):
    """Some more scores and values."""
    higher, safe = raised(score, peak)
    shrink = tl.exp(peak - safe)
    mass = tl.exp(score - safe[:, None])
    total = total * shrink + tl.sum(mass, 1)
    sums = tl.dot(mass.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
    return higher, total, sums


@triton.jit
def grow_scores(score, peak, total):
    """Some more scores, without values."""
    higher, safe = raised(score, peak)
    total = total * tl.exp(peak - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
    return higher, total


@triton.jit
def lse_of(peak, total):
    """The log-sum-exp as it stands."""
    return finite(peak) + tl.log(total)


@triton.jit
def add_scaled_scores(score, values, scale, peak, total, sums, PRECISION: tl.constexpr):
    """The same where `scale` brings scores, and peaks, to base 2."""
    higher, safe = raised(score, peak)
    shrink = tl.exp2((peak - safe) * scale)
    if values.dtype == tl.float32:
        mass = tl.exp2((score - safe[:, None]) * scale)  # the more exact
    else:
        mass = tl.exp2(score * scale - (safe * scale)[:, None])  # one instruction less
    total = total * shrink + tl.sum(mass, 1)
    sums = tl.dot(mass.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    return higher, total, sums
