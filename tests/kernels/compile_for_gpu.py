"""Compiles every Triton kernel for an H100 or H200, without one: `python compile_for_gpu.py`.

Kernels are launched as in serving, on a CPU's tensors; in the place of each launch its arguments'
types are compiled for the GPU. What a kernel would have written does not matter: no later launch
depends on values, only on shapes. Prints each kernel's name once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels import dynamic, judge, prefill
from kernels.attention import MOST_HEADS, Impl, dense_decode, selected_attention
from kernels.cache import LayerCache, Rows, Segment
from kernels.gpu import overlap
from kernels.gpu.coder import Coder
from kernels.gpu.decode import attend
from kernels.gpu.layer import add_norm, silu_mul
from kernels.gpu.linear import gated_linear, linear
from kernels.gpu.rotate import rotate_and_write
from kernels.page import PAGE
from kernels.policy import Dynamic
from kernels.timing import Phases

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
SHARED = 227 << 10
"""Bytes of shared memory that a program of an H100 may have."""
done: set[tuple[object, ...]] = set()


def compile_only(kernel, *args, grid, warmup, **named):
    """Stands in for the launch of a kernel."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    constants = {name: value for name, value in values.items() if name in named}
    types = {}
    for name, value in values.items():
        if name in constants:
            types[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            types[name] = f"tensordesc<{element}{value.block_shape}>"
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    key = (kernel.fn.__name__, *types.items(), *constants.items())
    if key in done:
        return
    done.add(key)
    # Memory is aligned, as what torch allocates is: fewer bytes then pass through shared memory.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, value in enumerate(values.values())
        if isinstance(value, torch.Tensor)
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED, (key, compiled.metadata.shared)
    print(kernel.fn.__name__)


def run(
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    queries: int,
    *,
    biased: bool = False,
    wide: bool = False,
    device: str = "cpu",
) -> None:
    """Everything that a step launches."""
    pages, context = 12, 700
    cache = LayerCache.allocate(pages, kv_heads, head_dim, dtype, device)
    cache = cache.biased(torch.ones(kv_heads * group, device=device) if biased else None)
    lengths = context - torch.arange(queries - 1, -1, -1, device=device)
    tables = torch.arange(pages, device=device)[None]
    rows = Rows(tables, lengths, torch.zeros_like(lengths))
    query = torch.randn(queries, kv_heads * group, head_dim, device=device).to(dtype)
    dense_decode(query, cache, rows, 0.1, Impl.TRITON)
    attend(query, cache, rows, Dynamic(), 0.1, Phases())
    if wide:  # where few programs scan they read as well
        tables = F.pad(rows.block_tables, (0, 600))
        attend(query, cache, replace(rows, block_tables=tables), Dynamic(), 0.1, Phases())
    selection = dynamic.select(query, cache, rows, Dynamic(sampled=False), 0.1)
    _, _, own = selected_attention(query, cache, rows, selection, 0.1, Impl.TRITON)
    judge.true_coverage(query, cache, rows, selection, own, 0.1, Impl.TRITON)
    segment = Segment.of(list(range(pages)), context - queries, queries, torch.device(device))
    tiles = prefill.choose(query, cache, segment, 0.02, 0.1, Impl.TRITON)
    for listed in (tiles, replace(tiles, left=None)):
        prefill.tile_attention(query, cache, segment, listed, 0.1, Impl.TRITON)


def layer(
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    normed: bool,
    device: str = "cpu",
) -> None:
    """What a captured step launches around attention."""
    with torch.device(device):
        hidden = torch.zeros(3, 640, dtype=dtype)
        weight = torch.ones(640, dtype=dtype)
        matrix = torch.zeros(320, 640, dtype=dtype)
        qkv = torch.zeros(3, kv_heads * (group + 2) * head_dim, dtype=dtype)
        cosines = torch.ones(3, 1, head_dim // 2)
        norms = (torch.ones(head_dim, dtype=dtype),) * 2 if normed else None
        slots = torch.tensor([-1, 63, 64])
    cache = LayerCache.allocate(2, kv_heads, head_dim, dtype, device)
    add_norm(hidden, hidden, weight, 1e-5)
    add_norm(hidden, None, weight, 1e-5)
    silu_mul(hidden)
    linear(hidden, matrix, matrix[0, :320])
    gated_linear(hidden, matrix)
    rotate_and_write(qkv, (cosines, cosines), slots, cache, norms, 1e-5)
    Coder([cache])(slots)


JOBS = (
    partial(run, 2, 2, 128, torch.bfloat16, 1, wide=True),
    partial(run, 1, 7, 96, torch.float16, 3),
    partial(run, 1, 1, 64, torch.float32, 1),
    partial(run, 1, 16, 128, torch.bfloat16, 1, biased=True),
    # The least and the most that `Impl.of` says they take.
    partial(run, 1, 1, 16, torch.float16, 1),
    partial(run, 1, MOST_HEADS, 256, torch.bfloat16, 1, wide=True),
    partial(layer, 8, 4, 128, torch.bfloat16, normed=False),
    partial(layer, 2, 16, 256, torch.float16, normed=True),
    partial(layer, 3, 1, 80, torch.float32, normed=True),
)
"""All kernels, in the shapes that compile differently; `device` may be given."""


if __name__ == "__main__":
    JITFunction.run = compile_only
    overlap.possible = lambda device: True
    assert PAGE == 64
    for job in JOBS:
        job()
