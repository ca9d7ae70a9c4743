"""Compiles every Triton kernel for an H100 or H200, without one: `python compile_for_gpu.py`.

Kernels are launched as in serving, on a CPU's tensors; in the place of each launch its arguments'
types are compiled for the GPU. What a kernel would have written does not matter: no later launch
depends on values, only on shapes. Prints each kernel's name once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels import dynamic, judge
from kernels.attention import Impl, selected_attention
from kernels.cache import LayerCache, Rows
from kernels.page import PAGE
from kernels.policy import Dynamic

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")
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
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    key = (kernel.fn.__name__, *types.items(), *constants.items())
    if key in done:
        return
    done.add(key)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.fn.__name__)


def run(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, queries: int) -> None:
    """Everything that a step launches."""
    pages, context = 12, 700
    cache = LayerCache.allocate(pages, kv_heads, head_dim, dtype, "cpu")
    lengths = context - torch.arange(queries - 1, -1, -1)
    rows = Rows(torch.arange(pages)[None], lengths, torch.zeros_like(lengths))
    query = torch.randn(queries, kv_heads * group, head_dim).to(dtype)
    for policy in (
        Dynamic(min_keys=0, max_keys=150),  # a budget that varies, a sample
        Dynamic(min_keys=150, max_keys=150, sampled=False),
    ):
        choice = dynamic.select(query, cache, rows, policy, 0.1, impl=Impl.TRITON)
        selection = choice.selection
        _, _, own = selected_attention(query, cache, rows, selection, 0.1, Impl.TRITON)
        judge.rest_of(query, cache, rows, selection, 0.1, Impl.TRITON)
        judge.true_coverage(query, cache, rows, selection, own, 0.1, Impl.TRITON)


if __name__ == "__main__":
    JITFunction.run = compile_only
    assert PAGE == 64
    run(2, 2, 128, torch.bfloat16, 1)
    run(1, 7, 96, torch.float16, 3)
    run(1, 1, 64, torch.float32, 1)
