"""Products of a few rows with a weight: as fast as the weight can be read.

A program holds some of the weight's lines, that is outputs, and reads their channels piece by piece
through a pipeline; rows stand in the columns of a tensor core's product. What a row gives does not
depend on how many others there are.

A norm before a product and a sum behind it take no launch of their own: see `Norm`, `add_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from kernels.gpu import overlap
from kernels.gpu.layer import silu, silu_mul

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8
"""Rows: the columns of the smallest product. More rows are the vendor's library's."""
LINES = 16
"""Outputs of a program."""
DEEP = 256
"""Channels that it reads at once."""
STAGES = 5
"""Pieces on their way at once."""
WARPS = 1
FETCHED = 2048
"""Bytes of each line that are brought into the L2 cache before the input is there."""


@dataclass(frozen=True, slots=True)
class Norm:
    """The root mean square norm that a product takes of its input, rounded as `add_norm` rounds."""

    weight: Tensor  # [inputs]
    eps: float
    squares: Tensor  # float32 [rows, parts]  the input's squares, added up over parts of a row


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.linear`, for few rows on a GPU.

    Args:
        x: [rows, inputs], contiguous: bfloat16, float16 or float32.
        weight: [outputs, inputs], contiguous.
        bias: [outputs].
        norm: of `x`, taken first; for `MOST` rows at the most.
        output: [rows, outputs], contiguous, where the product goes, rounded to the dtype of `x`
            and then to its own; new memory by default.

    Returns:
        [rows, outputs].
    """
    rows = x.shape[0]
    outputs = weight.shape[0]
    if rows > MOST:
        assert norm is None
        result = F.linear(x, weight, bias)
        return result if output is None else output.copy_(result)
    output = x.new_empty(rows, outputs) if output is None else output
    _linear[triton.cdiv(outputs, LINES),](
        x, weight, weight if bias is None else bias, *_of_norm(x, norm), x, output, output, rows,
        OUTPUTS=outputs, BIASED=bias is not None, ADDED=False, **_sizes(x, norm),
    )  # fmt: skip
    return output


def add_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a product to the residual stream.

    Args:
        x: [rows, inputs], contiguous, `MOST` rows at the most: bfloat16, float16 or float32.
        weight: [outputs, inputs], contiguous.
        bias: [outputs].
        hidden: [rows, outputs], contiguous.

    Returns:
        The sum [rows, outputs], rounded where the product and the sum would be, and its squares as
        `Norm` takes them.
    """
    rows, outputs = hidden.shape
    parts = triton.cdiv(outputs, LINES)
    total, squares = torch.empty_like(hidden), x.new_empty(rows, parts, dtype=torch.float32)
    _linear[parts,](
        x, weight, weight if bias is None else bias, *_of_norm(x, None), hidden, total, squares,
        rows, OUTPUTS=outputs, BIASED=bias is not None, ADDED=True, **_sizes(x, None),
    )  # fmt: skip
    return total, squares


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None
) -> Tensor:
    """SwiGLU's first half: silu(gate) * up, of which `linear` would give both side by side.

    Args:
        x: [rows, inputs], contiguous: bfloat16, float16 or float32.
        weight: [2 * outputs, inputs], contiguous, the gate first.
        bias: [2 * outputs].
        norm: of `x`, taken first; for `MOST` rows at the most.

    Returns:
        [rows, outputs], rounded where `linear` and `kernels.gpu.layer.silu_mul` round.
    """
    rows = x.shape[0]
    outputs = weight.shape[0] // 2
    if rows > MOST:
        assert norm is None
        return silu_mul(F.linear(x, weight, bias))
    output = x.new_empty(rows, outputs)
    _gated_linear[triton.cdiv(outputs, LINES),](
        x, weight, weight if bias is None else bias, *_of_norm(x, norm), output, rows,
        OUTPUTS=outputs, BIASED=bias is not None, **_sizes(x, norm),
    )  # fmt: skip
    return output


def _of_norm(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor, float]:
    """A norm's weight, squares and eps; tensors that are not read where there is none."""
    return (x, x, 0.0) if norm is None else (norm.weight, norm.squares, norm.eps)


def _sizes(x: Tensor, norm: Norm | None) -> dict[str, int | bool]:
    """What both kernels are compiled and launched with."""
    overlaps = overlap.possible(x.device)
    # No tensor core multiplies float32 exactly: more of it would not stay in registers.
    deep = DEEP if x.itemsize == 2 else DEEP // 4
    deep = min(deep, triton.next_power_of_2(x.shape[1]))
    return {
        "INPUTS": x.shape[1],
        "ROWS": MOST,
        "PARTS": 0 if norm is None else norm.squares.shape[1],
        "LINES": LINES,
        "DEEP": max(deep, 16),
        "STAGES": STAGES,
        "FETCHED": FETCHED,
        "OVERLAP": overlaps,
        "launch_pdl": overlaps,
        "num_warps": WARPS,
    }


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, weight, bias, norm, squares, eps, hidden, output, output_squares, rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    LINES: tl.constexpr, DEEP: tl.constexpr, STAGES: tl.constexpr, FETCHED: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < OUTPUTS
    overlap.begin(OVERLAP)
    _fetch(weight, line, inside, INPUTS, FETCHED, OVERLAP)
    overlap.wait(OVERLAP)
    channel, row = tl.arange(0, DEEP), tl.arange(0, ROWS)
    scale = _scale(squares, eps, row, rows, INPUTS, PARTS)
    place = row[None] * OUTPUTS + line[:, None]
    there = inside[:, None] & (row < rows)[None]
    if ADDED:
        before = tl.load(hidden + place, there, 0.0)
    total = tl.zeros((LINES, ROWS), tl.float32)
    for start in tl.range(0, INPUTS, DEEP, num_stages=STAGES):
        given = _rows(x, norm, scale, row, rows, start + channel, INPUTS, DEEP, PARTS)
        lines = _lines(weight, line, inside, start + channel, INPUTS, DEEP)
        total = tl.dot(lines, given, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + line, inside, 0.0).to(tl.float32)[:, None]
    result = total.to(x.dtype.element_ty)
    if ADDED:
        result = (before.to(tl.float32) + result.to(tl.float32)).to(x.dtype.element_ty)
        wide = tl.where(there, result.to(tl.float32), 0.0)
        part = output_squares + row * tl.num_programs(0) + tl.program_id(0)
        tl.store(part, tl.sum(wide * wide, 0), row < rows)
    tl.store(output + place, result.to(output.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _gated_linear(
    x, weight, bias, norm, squares, eps, output, rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    LINES: tl.constexpr, DEEP: tl.constexpr, STAGES: tl.constexpr, FETCHED: tl.constexpr,
    BIASED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows, from as many lines of the gate and of the other half."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < OUTPUTS
    overlap.begin(OVERLAP)
    _fetch(weight, line, inside, INPUTS, FETCHED, OVERLAP)
    _fetch(weight, line + OUTPUTS, inside, INPUTS, FETCHED, OVERLAP)
    overlap.wait(OVERLAP)
    channel, row = tl.arange(0, DEEP), tl.arange(0, ROWS)
    scale = _scale(squares, eps, row, rows, INPUTS, PARTS)
    gate = tl.zeros((LINES, ROWS), tl.float32)
    up = tl.zeros((LINES, ROWS), tl.float32)
    for start in tl.range(0, INPUTS, DEEP, num_stages=STAGES):
        given = _rows(x, norm, scale, row, rows, start + channel, INPUTS, DEEP, PARTS)
        lines = _lines(weight, line, inside, start + channel, INPUTS, DEEP)
        others = _lines(weight, line + OUTPUTS, inside, start + channel, INPUTS, DEEP)
        gate = tl.dot(lines, given, gate, input_precision="ieee")
        up = tl.dot(others, given, up, input_precision="ieee")
    if BIASED:
        gate += tl.load(bias + line, inside, 0.0).to(tl.float32)[:, None]
        up += tl.load(bias + OUTPUTS + line, inside, 0.0).to(tl.float32)[:, None]
    dtype = output.dtype.element_ty
    result = silu(gate.to(dtype)).to(tl.float32) * up.to(dtype).to(tl.float32)
    target = output + row[None] * OUTPUTS + line[:, None]
    tl.store(target, result.to(dtype), inside[:, None] & (row < rows)[None])


@triton.jit
def _scale(squares, eps, row, rows, INPUTS: tl.constexpr, PARTS: tl.constexpr):
    """What normalises each row: its root mean square, inverted; 1 where there is no norm."""
    scale = tl.full(row.shape, 1.0, tl.float32)
    if PARTS > 0:
        part = tl.arange(0, triton.next_power_of_2(PARTS))
        some = tl.load(
            squares + row[:, None] * PARTS + part[None],
            (row < rows)[:, None] & (part < PARTS)[None],
            0.0,
        )  # [ROWS, parts]
        scale = tl.rsqrt(tl.sum(some, 1) / INPUTS + eps)
    return scale


@triton.jit
def _fetch(
    weight, line, inside, INPUTS: tl.constexpr, FETCHED: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Have the beginning of some lines in the L2 cache when the input is there."""
    numbers: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    piece = tl.arange(0, FETCHED // 128) * numbers
    begin = tl.where(inside, line, 0).to(tl.int64)[:, None] * INPUTS
    overlap.prefetch(weight + begin + tl.where(piece < INPUTS, piece, 0)[None], OVERLAP)


@triton.jit
def _rows(
    x, norm, scale, row, rows, channel,
    INPUTS: tl.constexpr, DEEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Some channels of all rows, normalised where there is a norm: [channels, rows]."""
    there = (row < rows)[None]
    if INPUTS % DEEP != 0:
        there = there & (channel < INPUTS)[:, None]
    given = tl.load(x + row[None] * INPUTS + channel[:, None], there, 0.0)
    if PARTS > 0:
        dtype = x.dtype.element_ty
        if INPUTS % DEEP != 0:
            factor = tl.load(norm + channel, channel < INPUTS, 0.0).to(tl.float32)
        else:
            factor = tl.load(norm + channel).to(tl.float32)
        normed = (given.to(tl.float32) * scale[None]).to(dtype).to(tl.float32)
        given = (factor[:, None] * normed).to(dtype)
    return given


@triton.jit
def _lines(weight, line, inside, channel, INPUTS: tl.constexpr, DEEP: tl.constexpr):
    """Some channels of some lines, which are read once: [lines, channels]."""
    there = inside[:, None]
    if INPUTS % DEEP != 0:
        there = there & (channel < INPUTS)[None]
    place = line.to(tl.int64)[:, None] * INPUTS + channel[None]
    return tl.load(weight + place, there, 0.0, eviction_policy="evict_first")
