"""What stands between a layer's products: the residual sum with its norm, and SwiGLU's middle.

Everything is rounded where torch's operations round it, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu import overlap

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Channels of a program that works on each channel alone."""
CHANNELS_PER_WARP = 256
"""Eight a thread: 16 bytes of bfloat16."""


def add_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and take the sum's root mean square norm.

    Args:
        hidden: [rows, size], contiguous: bfloat16, float16 or float32.
        update: [rows, size], contiguous; None adds nothing.
        weight: [size], of the norm.
        eps: of the norm.

    Returns:
        The sum [rows, size], which is `hidden` itself without an update, and its norm [rows, size].
    """
    rows, size = hidden.shape
    total, normed = hidden if update is None else torch.empty_like(hidden), torch.empty_like(hidden)
    width, overlaps = triton.next_power_of_2(size), overlap.possible(hidden.device)
    _add_norm[rows,](
        hidden, hidden if update is None else update, weight, total, normed, eps,
        SIZE=size, WIDTH=width, ADDED=update is not None, OVERLAP=overlaps, launch_pdl=overlaps,
        num_warps=min(max(width // CHANNELS_PER_WARP, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's middle: silu(gate) * up.

    Args:
        gate_up: [rows, 2 * size], contiguous, the gate first: bfloat16, float16 or float32.

    Returns:
        [rows, size].
    """
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, size)
    overlaps = overlap.possible(gate_up.device)
    _silu_mul[rows, triton.cdiv(size, BLOCK)](
        gate_up, output, SIZE=size, BLOCK=BLOCK, OVERLAP=overlaps, launch_pdl=overlaps, num_warps=4
    )
    return output


@triton.jit
def _add_norm(
    hidden, update, weight, total, normed, eps,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row."""
    overlap.begin(OVERLAP)
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = channel < SIZE
    place = row * SIZE + channel
    dtype = hidden.dtype.element_ty
    factor = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    overlap.wait(OVERLAP)
    x = tl.load(hidden + place, inside, 0.0)
    if ADDED:
        more = tl.load(update + place, inside, 0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(dtype)
        tl.store(total + place, x, inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    result = factor * (wide * scale).to(dtype).to(tl.float32)
    tl.store(normed + place, result.to(dtype), inside)


@triton.jit
def _silu_mul(
    gate_up, output, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Some channels of one row."""
    overlap.begin(OVERLAP)
    overlap.wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + channel, inside, 0.0)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + channel, inside, 0.0)
    result = silu(gate).to(tl.float32) * up.to(tl.float32)
    tl.store(output + row * SIZE + channel, result.to(output.dtype.element_ty), inside)


@triton.jit
def silu(x):
    """x * sigmoid(x), in the dtype of `x`."""
    wide = x.to(tl.float32)
    return tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(x.dtype)
