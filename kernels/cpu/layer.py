"""What stands between a layer's products: `kernels.gpu.layer` and `rotate` for a CPU.

Everything is rounded where torch's operations round it, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.keys import numbers
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.number import exp, long_vectors, number, stored

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache

LEAST = 64
"""Fewest rows that are worth a second thread."""
_ONE = np.float32(1)


def add_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and take the sum's root mean square norm.

    Args:
        hidden: [rows, size], bfloat16 or float32.
        update: [rows, size]; None adds nothing.
        weight: [size], of the norm.
        eps: of the norm.

    Returns:
        The sum [rows, size], which is `hidden` without an update, and its norm [rows, size].
    """
    hidden, normed = hidden.contiguous(), hidden.new_empty(hidden.shape)
    total = hidden if update is None else hidden.new_empty(hidden.shape)
    shared = (
        numbers(hidden), numbers(hidden if update is None else update), numbers(weight),
        np.float32(eps), update is not None, numbers(total), numbers(normed),
    )  # fmt: skip
    in_threads(_add_norm, shared, len(hidden), LEAST)
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's middle, silu(gate) * up: [rows, size] of [rows, 2 * size], the gate first."""
    output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    in_threads(_silu_mul, (numbers(gate_up), numbers(output)), len(output), LEAST)
    return output


def rotate_and_write(
    qkv: Tensor, angles: tuple[Tensor, Tensor], slots: Tensor, cache: LayerCache
) -> Tensor:
    """Rotate queries and keys, and write keys and values.

    Args:
        qkv: [rows, (heads + 2 * kv_heads) * head_dim]: queries, keys, values.
        angles: cosines and sines of the rows' positions, float32 [rows, 1, head_dim / 2];
            channel i turns with channel i + head_dim / 2.
        slots: int64 [rows], physical page * 64 + offset of each row's key.
        cache: the layer's paged cache, in the dtype of `qkv`.

    Returns:
        The rotated queries [rows, heads, head_dim].
    """
    rows, kv_heads, head_dim = len(qkv), cache.kv_heads, cache.head_dim
    query = qkv.new_empty(rows, qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)
    turns = (part[:, 0].contiguous().numpy() for part in angles)
    shared = (
        numbers(qkv.view(rows, -1, head_dim)), *turns, slots.numpy(), numbers(query),
        numbers(cache.kv.view(kv_heads, -1, 2, head_dim)),
    )  # fmt: skip
    in_threads(_rotate, shared, rows, LEAST)
    return query


def _kernels(version: int) -> tuple[Any, Any, Any]:
    """The kernels; see `sources` for the version."""

    @entry
    def add_norm_rows(
        hidden: Any, update: Any, weight: Any, eps: Any, added: bool, total: Any, normed: Any,
        _part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        _ = version
        long_vectors()
        size = hidden.shape[1]
        for row in range(start, stop):
            square = np.float32(0)
            if added:
                for channel in range(size):
                    value = number(hidden[row, channel]) + number(update[row, channel])
                    total[row, channel] = stored(value, total)
            for channel in range(size):
                value = number(total[row, channel])
                square += value * value
            part = _ONE / np.sqrt(square / np.float32(size) + eps)
            for channel in range(size):
                value = number(stored(number(total[row, channel]) * part, normed))
                normed[row, channel] = stored(value * number(weight[channel]), normed)

    @entry
    def silu_mul_rows(gate_up: Any, output: Any, _part: int, start: int, stop: int) -> None:
        _ = version
        long_vectors()
        size = output.shape[1]
        for row in range(start, stop):
            for channel in range(size):
                gate = number(gate_up[row, channel])
                gate = number(stored(gate / (_ONE + exp(-gate)), output))
                output[row, channel] = stored(gate * number(gate_up[row, size + channel]), output)

    @entry
    def rotate_rows(
        qkv: Any, cos: Any, sin: Any, slots: Any, query: Any, kv: Any, _part: int, start: int,
        stop: int,
    ) -> None:  # fmt: skip
        _ = version
        long_vectors()
        heads, kv_heads, half = query.shape[1], kv.shape[0], cos.shape[1]
        for row in range(start, stop):
            for head in range(heads + kv_heads):
                out = query[row, head] if head < heads else kv[head - heads, slots[row], 0]
                for channel in range(half):
                    first = number(qkv[row, head, channel])
                    second = number(qkv[row, head, half + channel])
                    one, two = cos[row, channel], sin[row, channel]
                    out[channel] = stored(first * one - second * two, out)
                    out[half + channel] = stored(second * one + first * two, out)
            for head in range(kv_heads):
                for channel in range(2 * half):
                    value = qkv[row, heads + kv_heads + head, channel]
                    kv[head, slots[row], 1, channel] = value

    return add_norm_rows, silu_mul_rows, rotate_rows


_add_norm, _silu_mul, _rotate = _kernels(sources())
