"""Positions that a model learned: vectors that are added to the tokens' own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from models.make import Make


class LearnedPositions(nn.Module):
    """A table of vectors for each axis of a grid through which positions run row by row.

    With one axis every position has a vector of its own. With more a position's vector is the sum
    of its coordinates': rows, columns and channels of an image, or rows and columns of a stride
    (Child et al. 2019, "Generating Long Sequences with Sparse Transformers", 5.3).
    """

    def __init__(self, shape: tuple[int, ...], size: int, make: Make) -> None:
        super().__init__()
        self.shape = shape
        self.axes = nn.ModuleList(make.embedding(length, size) for length in shape)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors [tokens, size] of int64 positions [tokens], each below the grid's size."""
        total: Tensor | None = None
        for axis, (length, table) in enumerate(zip(self.shape, self.axes, strict=True)):
            later = math.prod(self.shape[axis + 1 :])
            vectors: Tensor = table(positions // later % length)  # [tokens, size]
            total = vectors if total is None else total + vectors
        assert total is not None
        return total
