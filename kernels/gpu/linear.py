"""Products of a few rows with a weight: as fast as the weight can be read.

A program holds some of the weight's lines, that is outputs, and reads their channels piece by piece
through a pipeline; rows stand in the columns of a tensor core's product. What a row gives does not
depend on how many others there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch.nn import functional as F

from kernels.gpu import overlap
from kernels.gpu.launch import MULTIPROCESSORS
from kernels.gpu.layer import silu, silu_mul

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8
"""Rows: the columns of the smallest product. More rows are the vendor's library's."""
LINES = 16
"""Outputs of a program."""
RESIDENT = 2 * MULTIPROCESSORS
"""Programs of a product, at the most, that are few."""
WARPS = 1


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How a program reads its lines."""

    deep: int  # bytes of each line at once
    stages: int  # pieces on their way at once
    fetched: int  # bytes of each line that are fetched before the input is there


FEW = Pipeline(1024, 5, 512)
"""Of a product of few programs."""
MANY = Pipeline(512, 6, 1024)
"""Three on a multiprocessor leave shared memory for programs of what follows."""
GATED = Pipeline(1024, 2, 256)
"""Of twice as many lines."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, output: Tensor | None = None
) -> Tensor:
    """`torch.nn.functional.linear`, for few rows on a GPU.

    Args:
        x: [rows, inputs], contiguous: bfloat16, float16 or float32.
        weight: [outputs, inputs], contiguous.
        bias: [outputs].
        output: [rows, outputs], contiguous: takes the result, which is rounded as without it.

    Returns:
        [rows, outputs], of the dtype of `x` or `output` itself.
    """
    rows, outputs = x.shape[0], weight.shape[0]
    if rows > MOST:
        result = F.linear(x, weight, bias)
        return result if output is None else output.copy_(result)
    if output is None:
        output = x.new_empty(rows, outputs)
    programs = triton.cdiv(outputs, LINES)
    _linear[programs,](
        x, weight, weight if bias is None else bias, output, rows,
        OUTPUTS=outputs, BIASED=bias is not None,
        **_sizes(x, FEW if programs <= RESIDENT else MANY),
    )  # fmt: skip
    return output


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """SwiGLU's first half: silu(gate) * up, of which `linear` would give both side by side.

    Args:
        x: [rows, inputs], contiguous: bfloat16, float16 or float32.
        weight: [2 * outputs, inputs], contiguous, the gate first.
        bias: [2 * outputs].

    Returns:
        [rows, outputs], rounded where `linear` and `kernels.gpu.layer.silu_mul` round.
    """
    rows = x.shape[0]
    outputs = weight.shape[0] // 2
    if rows > MOST:
        return silu_mul(F.linear(x, weight, bias))
    output = x.new_empty(rows, outputs)
    _gated_linear[triton.cdiv(outputs, LINES),](
        x, weight, weight if bias is None else bias, output, rows,
        OUTPUTS=outputs, BIASED=bias is not None, **_sizes(x, GATED),
    )  # fmt: skip
    return output


def _sizes(x: Tensor, pipeline: Pipeline) -> dict[str, int | bool]:
    """What both kernels are compiled and launched with."""
    overlaps = overlap.possible(x.device)
    deep = min(pipeline.deep // x.itemsize, triton.next_power_of_2(x.shape[1]))
    return {
        "INPUTS": x.shape[1],
        "ROWS": MOST,
        "LINES": LINES,
        "DEEP": max(deep, 16),
        "STAGES": pipeline.stages,
        "FETCHED": pipeline.fetched,
        "OVERLAP": overlaps,
        "launch_pdl": overlaps,
        "num_warps": WARPS,
    }


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, weight, bias, output, rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    DEEP: tl.constexpr, STAGES: tl.constexpr, FETCHED: tl.constexpr, BIASED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < OUTPUTS
    overlap.begin(OVERLAP)
    _fetch(weight, line, inside, INPUTS, FETCHED, OVERLAP)
    overlap.wait(OVERLAP)
    channel, row = tl.arange(0, DEEP), tl.arange(0, ROWS)
    total = tl.zeros((LINES, ROWS), tl.float32)
    for start in tl.range(0, INPUTS, DEEP, num_stages=STAGES):
        given = _rows(x, row, rows, start + channel, INPUTS, DEEP)
        lines = _lines(weight, line, inside, start + channel, INPUTS, DEEP)
        total = tl.dot(lines, given, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + line, inside, 0.0).to(tl.float32)[:, None]
    target = output + row[None] * OUTPUTS + line[:, None]
    rounded = total.to(x.dtype.element_ty).to(output.dtype.element_ty)
    tl.store(target, rounded, inside[:, None] & (row < rows)[None])


@triton.jit(do_not_specialize=["rows"])
def _gated_linear(
    x, weight, bias, output, rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    DEEP: tl.constexpr, STAGES: tl.constexpr, FETCHED: tl.constexpr, BIASED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows, from as many lines of the gate and of the other half."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < OUTPUTS
    overlap.begin(OVERLAP)
    _fetch(weight, line, inside, INPUTS, FETCHED, OVERLAP)
    _fetch(weight, line + OUTPUTS, inside, INPUTS, FETCHED, OVERLAP)
    overlap.wait(OVERLAP)
    channel, row = tl.arange(0, DEEP), tl.arange(0, ROWS)
    gate = tl.zeros((LINES, ROWS), tl.float32)
    up = tl.zeros((LINES, ROWS), tl.float32)
    for start in tl.range(0, INPUTS, DEEP, num_stages=STAGES):
        given = _rows(x, row, rows, start + channel, INPUTS, DEEP)
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
def _fetch(
    weight, line, inside, INPUTS: tl.constexpr, FETCHED: tl.constexpr, OVERLAP: tl.constexpr
):
    """Have the beginning of some lines in the L2 cache when the input is there."""
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    there = weight + tl.where(inside, line, 0).to(tl.int64) * INPUTS
    overlap.prefetch_lines(there, min(FETCHED // size, INPUTS), OVERLAP)


@triton.jit
def _rows(x, row, rows, channel, INPUTS: tl.constexpr, DEEP: tl.constexpr):
    """Some channels of all rows, [channels, rows]."""
    there = (row < rows)[None]
    if INPUTS % DEEP != 0:
        there = there & (channel < INPUTS)[:, None]
    return tl.load(x + row[None] * INPUTS + channel[:, None], there, 0.0)


@triton.jit
def _lines(weight, line, inside, channel, INPUTS: tl.constexpr, DEEP: tl.constexpr):
    """Some channels of some lines, which are read once: [lines, channels]."""
    there = inside[:, None]
    if INPUTS % DEEP != 0:
        there = there & (channel < INPUTS)[None]
    place = line.to(tl.int64)[:, None] * INPUTS + channel[None]
    return tl.load(weight + place, there, 0.0, eviction_policy="evict_first")
