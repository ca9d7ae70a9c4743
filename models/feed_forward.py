"""The feed-forward part of a layer: each token by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import Impl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from models.config import ModelConfig
    from models.make import Make


def feed_forward(config: ModelConfig, make: Make) -> SwiGLU | Mlp:
    """A layer's feed-forward part, as the model's activation asks."""
    return SwiGLU(config, make) if config.activation == "swiglu" else Mlp(config, make)


class SwiGLU(nn.Module):
    """A gated part (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: ModelConfig, make: Make) -> None:
        super().__init__()
        self.impl = make.impl
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = make.joint(outer, 2 * inner, bias=bias)
        self.gate_proj, self.up_proj = self.gate_up.parts([inner, inner])
        self.down_proj = make.linear(inner, outer, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Feed-forward of each token, [tokens, hidden_size] to the same."""
        both = self.gate_up(hidden)  # [tokens, 2 * intermediate_size]
        if self.impl is Impl.TRITON:
            from kernels.gpu.layer import silu_mul  # a CPU has no Triton

            inner = silu_mul(both)
        elif self.impl is Impl.NUMBA:
            from kernels.cpu.layer import silu_mul as silu_mul_on_cpu  # numba takes a moment

            inner = silu_mul_on_cpu(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        output: Tensor = self.down_proj(inner)
        return output


class Mlp(nn.Module):
    """Two projections with a GELU between them (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: ModelConfig, make: Make) -> None:
        super().__init__()
        self.activate = _GELUS[config.activation]
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = make.linear(outer, inner, bias=bias)
        self.down_proj = make.linear(inner, outer, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Feed-forward of each token, [tokens, hidden_size] to the same."""
        output: Tensor = self.down_proj(self.activate(self.up_proj(hidden)))
        return output


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_GELUS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
}
