"""Causal attention for training: the fastest of PyTorch's fused kernels on this device."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.training.errors import TrainingError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from models.training.plans import Shape


@dataclass(frozen=True, slots=True)
class Attention:
    """How to call scaled dot-product attention."""

    backend: SDPBackend | None = None  # None: PyTorch's own choice
    grouped: bool = False  # the kernel shares KV heads itself, or they are repeated for it

    def context(self) -> AbstractContextManager[None]:
        """Forward passes must run inside, so that the backend is in force."""
        return nullcontext() if self.backend is None else sdpa_kernel([self.backend])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        """q [tokens, heads, dim], k and v of fewer heads -> [tokens, heads * dim]."""
        tokens, heads, dim = q.shape
        group = heads // k.shape[1]
        if group > 1 and not self.grouped:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        # [rows, heads, length, dim] each
        q, k, v = (x.view(rows, tokens // rows, -1, dim).transpose(1, 2) for x in (q, k, v))
        grouped = self.grouped and group > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(tokens, heads * dim)


def choose_attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> Attention:
    """Times the fused kernels forward and backward, and takes the fastest correct one.

    Raises:
        TrainingError: a GPU on which neither cuDNN's nor the flash kernel runs.
    """
    if device.type != "cuda":
        return Attention()
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:
        size = (tokens, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows, length = 4, 8192
    small = [draw(2 * 256, h) for h in (shape.heads, shape.kv_heads, shape.kv_heads)]
    large = [draw(rows * length, h) for h in (shape.heads, shape.kv_heads, shape.kv_heads)]
    with sdpa_kernel([SDPBackend.MATH]):
        expected, expected_grads = _forward_backward(Attention(), small, 2)
    found: list[tuple[float, Attention]] = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        for grouped in (True, False):
            way = Attention(backend, grouped)
            try:
                with way.context():
                    out, grads = _forward_backward(way, small, 2)
                    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
                    wrong = any((a - b).norm() > 0.03 * b.norm() for a, b in pairs)
                    _forward_backward(way, large, rows)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(5):
                        _forward_backward(way, large, rows)
                    torch.cuda.synchronize()
                    seconds = (time.perf_counter() - start) / 5
            except RuntimeError as error:
                print(f"attention {way}: not available ({str(error).splitlines()[0]})")
                continue
            print(f"attention {way}: {1e3 * seconds:.2f} ms{', WRONG' if wrong else ''}")
            if not wrong:
                found.append((seconds, way))
    if not found:
        raise TrainingError(
            "Neither cuDNN's nor the flash attention runs on this GPU: use one of compute "
            "capability 8.0 or later with a PyTorch built for it."
        )
    return min(found, key=lambda item: item[0])[1]


def _forward_backward(
    way: Attention, inputs: list[Tensor], rows: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
    out = way(q, k, v, rows)
    grads = torch.autograd.grad(out, leaves, torch.cos(out.detach()))
    return out.detach(), grads
