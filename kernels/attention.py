"""Attention over the paged KV cache: the ops, and the one place where a backend is chosen.

Selectors say where to look (`kernels.dynamic`, `kernels.patterns`); these ops look there.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from kernels import reference, torch_dense, torch_selected
from kernels.codes import WORD, words
from kernels.errors import KernelError
from kernels.softmax import wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows, Segment
    from kernels.selection import Selection

MOST_HEADS = 32
"""Query heads of a KV head that Triton's kernels take."""


class Impl(StrEnum):
    """Which code runs. Chosen once by the caller; nothing here switches to another by itself."""

    REFERENCE = "reference"
    """The specification, in float64: slow, for tests."""
    TORCH = "torch"
    """Plain torch operations: correct on any device, in any dtype."""
    NUMBA = "numba"
    """Numba's kernels: for a CPU, in bfloat16 and float32. Dense attention is torch's."""
    TRITON = "triton"
    """Triton's kernels: for a GPU, in bfloat16, float16 and float32, heads of most sizes."""

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> Impl:
        """The fastest that can run.

        Args:
            device: where the model is.
            dtype: its own and its cache's.
            head_dim: channels of a head.
            group: query heads of a KV head.
        """
        if device.type == "cuda" and _triton_takes(dtype, head_dim, group):
            return Impl.TRITON
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
            return Impl.NUMBA
        return Impl.TORCH


def _triton_takes(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether Triton's kernels compile for a shape, and fit an H100's shared memory.

    A product adds up 16 channels at the least, and a code's channels, whole words of them, are a
    power of two.
    """
    return (
        dtype in (torch.bfloat16, torch.float16, torch.float32)
        and 16 <= head_dim <= 8 * WORD
        and words(head_dim) != 6
        and group <= MOST_HEADS
    )


def selected_attention(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    selection: Selection,
    scale: float,
    impl: Impl = Impl.TORCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row over exactly its selected keys.

    Args:
        query: [rows, heads, head_dim], heads a multiple of the cache's KV heads.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        selection: the keys each row attends to, and how many times each of them counts.
        scale: factor on the scores, usually head_dim ** -0.5.
        impl: backend.

    Returns:
        Output [rows, heads, head_dim] in the query's dtype and, in float32 (float64 for float64
        inputs), the log-sum-exp [rows, heads] with weights and that of the keys themselves, each
        counted once. A row without keys gives 0 and -inf.

    Raises:
        KernelError: when the shapes or dtypes do not fit together.
    """
    check_query(query, cache, impl)
    expected = (query.shape[0], cache.kv_heads)
    if tuple(selection.counts.shape) != expected or rows.lengths.shape[0] != query.shape[0]:
        raise KernelError(
            f"the selection must have [rows, kv_heads] = {list(expected)}, "
            f"not {list(selection.counts.shape)} over {rows.lengths.shape[0]} rows"
        )
    if impl is Impl.REFERENCE:
        output, lse, own = reference.selected_attention(query, cache, rows, selection, scale)
        return output.to(query.dtype), lse.to(wide(query.dtype)), own.to(wide(query.dtype))
    if impl is Impl.TRITON:
        from kernels.gpu import attend  # a CPU has no Triton

        return attend.selected_attention(query, cache, rows, selection, scale)
    if impl is Impl.NUMBA:
        from kernels.cpu import attend as attend_on_cpu  # numba takes a moment

        return attend_on_cpu.selected_attention(query, cache, rows, selection, scale)
    return torch_selected.selected_attention(query, cache, rows, selection, scale)


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float, impl: Impl = Impl.TORCH
) -> tuple[Tensor, Tensor]:
    """Attention of single tokens over every key that each of them sees.

    Args:
        query: [rows, heads, head_dim]; the tokens' own keys are already in the cache.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        scale: factor on the scores, usually head_dim ** -0.5.
        impl: backend.

    Returns:
        Output [rows, heads, head_dim] in the query's dtype and log-sum-exp [rows, heads] in
        float32 (float64 for float64 inputs).

    Raises:
        KernelError: when the shapes or dtypes do not fit together.
    """
    check_query(query, cache, impl)
    if impl is Impl.REFERENCE:
        output, lse = reference.dense_decode(query, cache, rows, scale)
        return output.to(query.dtype), lse.to(wide(query.dtype))
    if impl is Impl.TRITON:
        from kernels.gpu import attend  # a CPU has no Triton

        return attend.dense_decode(query, cache, rows, scale)
    return torch_dense.dense_decode(query, cache, rows, scale)


def dense_attention(
    query: Tensor,
    cache: LayerCache,
    segment: Segment,
    scale: float,
    window: int | None = None,
    impl: Impl = Impl.TORCH,
) -> Tensor:
    """Causal attention of consecutive tokens over everything before them and themselves.

    Args:
        query: [tokens, heads, head_dim]; the tokens' own keys are already in the cache.
        cache: the layer's paged cache.
        segment: where the tokens stand and where their keys lie.
        scale: factor on the scores, usually head_dim ** -0.5.
        window: keys a token sees, itself included; None for all.
        impl: backend.

    Returns:
        [tokens, heads, head_dim] in the query's dtype.

    Raises:
        KernelError: when the shapes or dtypes do not fit together.
    """
    check_query(query, cache, impl)
    if query.shape[0] != segment.tokens:
        raise KernelError(f"the segment has {segment.tokens} tokens, the query {query.shape[0]}")
    if impl is Impl.REFERENCE:
        return reference.dense_attention(query, cache, segment, scale, window).to(query.dtype)
    if impl is Impl.TRITON:
        from kernels.gpu import dense  # a CPU has no Triton

        return dense.dense_attention(query, cache, segment, scale, window)
    return torch_dense.dense_attention(query, cache, segment, scale, window)


def check_query(query: Tensor, cache: LayerCache, impl: Impl) -> None:
    """Whether a query fits the cache and the backend.

    Raises:
        KernelError: naming what does not fit.
    """
    if query.dim() != 3 or query.shape[2] != cache.head_dim or query.shape[1] % cache.kv_heads:
        raise KernelError(
            f"the query must be [rows, a multiple of {cache.kv_heads} heads, {cache.head_dim}], "
            f"not {list(query.shape)}"
        )
    if cache.slopes is not None and cache.slopes.shape != query.shape[1:2]:
        raise KernelError(
            f"the cache has slopes {list(cache.slopes.shape)}, the query {query.shape[1]} heads"
        )
    if impl is Impl.NUMBA and query.dtype not in (torch.float32, torch.bfloat16):
        raise KernelError(f"numba's kernels read float32 and bfloat16, not {query.dtype}")
    if query.dtype != cache.kv.dtype or query.device != cache.kv.device:
        raise KernelError(
            f"the query is {query.dtype} on {query.device}, "
            f"the cache {cache.kv.dtype} on {cache.kv.device}: they must agree"
        )
