"""Projections of the same input with one weight, so that a single product computes them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Joint:
    """Several projections, the rows of their weights one behind the other."""

    weight: Tensor  # [outputs of all parts, inputs]
    bias: Tensor | None  # [outputs of all parts]

    @staticmethod
    def of(whole: nn.Linear) -> Joint:
        """All of them, as one module's parameters."""
        return Joint(whole.weight.detach(), None if whole.bias is None else whole.bias.detach())

    def parts(self, outputs: list[int]) -> list[nn.Linear]:
        """Each projection as a module of its own, with the names and shapes that checkpoints have.

        Their parameters are views: what is copied into them is what the joint product reads. A
        parameter that is put in another's place it does not see.

        Args:
            outputs: sizes of the projections, in order; together the joint one's.
        """
        weights = torch.split(self.weight, outputs)
        biases = [None] * len(outputs) if self.bias is None else torch.split(self.bias, outputs)
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            part.weight = nn.Parameter(weight)
            if bias is not None:
                part.bias = nn.Parameter(bias)
            parts.append(part)
        return parts

    def __call__(self, x: Tensor) -> Tensor:
        """All projections of `x` [rows, inputs] side by side: [rows, outputs of all parts]."""
        return F.linear(x, self.weight, self.bias)
