"""Modules with parameters that are allocated and not filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.joint import Joint
from models.norms import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from kernels.attention import Impl
    from models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Make:
    """Builds a decoder's modules on one device in one dtype."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device | str
    impl: Impl

    def linear(self, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
        """A projection."""
        # By way of "meta", which skips torch's random initialisation of every weight.
        empty = nn.Linear(inputs, outputs, bias=bias, dtype=self.dtype, device="meta")
        return empty.to_empty(device=self.device)

    def joint(self, inputs: int, outputs: int, *, bias: bool) -> Joint:
        """Several projections of the same input; `outputs` is their sizes' sum."""
        return Joint.of(self.linear(inputs, outputs, bias=bias))

    def embedding(self, rows: int, size: int) -> nn.Embedding:
        """A table of vectors."""
        empty = nn.Embedding(rows, size, dtype=self.dtype, device="meta")
        return empty.to_empty(device=self.device)

    def norm(self, size: int) -> RMSNorm | LayerNorm:
        """The model's norm, over vectors of a size."""
        eps = self.config.norm_eps
        if self.config.norm == "layer":
            return LayerNorm(size, eps, self.dtype, self.device, bias=self.config.norm_bias)
        return RMSNorm(size, eps, self.dtype, self.device, self.impl)

    def head_norm(self, size: int) -> RMSNorm:
        """A norm of each head's queries or keys."""
        return RMSNorm(size, self.config.norm_eps, self.dtype, self.device, self.impl)
