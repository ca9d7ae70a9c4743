"""Norms over the channels of a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import Impl

if TYPE_CHECKING:
    from torch import Tensor


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32 or wider."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str, impl: Impl
    ) -> None:
        super().__init__()
        self.eps = eps
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension; same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def add(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of both, [tokens, size], and its norm; None adds nothing."""
        if self.impl is Impl.TRITON:
            from kernels.gpu.layer import add_norm  # a CPU has no Triton

            return add_norm(hidden, update, self.weight, self.eps)
        if self.impl is Impl.NUMBA:
            from kernels.cpu.layer import add_norm as add_norm_on_cpu  # numba takes a moment

            return add_norm_on_cpu(hidden, update, self.weight, self.eps)
        total = hidden if update is None else hidden + update
        return total, self(total)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016), with a bias or without."""

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension; same shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of both, [tokens, size], and its norm; None adds nothing."""
        total = hidden if update is None else hidden + update
        return total, self(total)
