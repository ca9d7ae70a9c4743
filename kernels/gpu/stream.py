"""The residual stream of a step between a layer's products, in as few launches as there are those.

Of few rows, each product takes the norm of its input while it reads it, and writes the sum of its
output and the stream. More rows are the library's, and a launch between two of its products adds
and takes the norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

from kernels.gpu.layer import add_norm
from kernels.gpu.linear import MOST, Norm, add_linear, gated_linear, linear

if TYPE_CHECKING:
    from torch import Tensor

RmsNorm = tuple["Tensor", float]
"""A root mean square norm's weight [size] and eps."""


class Stream:
    """What each layer's parts read and add to.

    Args:
        hidden: [rows, size], contiguous: bfloat16, float16 or float32.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._squares: Tensor | None = None  # see `Norm`; None where no product has left them
        self._update: Tensor | None = None  # what has yet to be added

    def linear(self, norm: RmsNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A product of the stream's norm; see `kernels.gpu.linear.linear`."""
        x, fused = self._given(norm)
        return linear(x, weight, bias, norm=fused)

    def gated_linear(self, norm: RmsNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
        """SwiGLU's first half of the stream's norm; see `kernels.gpu.linear.gated_linear`."""
        x, fused = self._given(norm)
        return gated_linear(x, weight, bias, norm=fused)

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Add a product of `x` [rows, inputs]."""
        if x.shape[0] > MOST:
            assert self._update is None
            self._update = F.linear(x, weight, bias)
        else:
            self._hidden, self._squares = add_linear(x, weight, bias, self._hidden)

    def normed(self, norm: RmsNorm, finite: Tensor | None = None) -> Tensor:
        """The stream's norm [rows, size]; see `kernels.gpu.layer.add_norm`."""
        self._hidden, normed = add_norm(self._hidden, self._update, *norm, finite=finite)
        self._update = None
        return normed

    def _given(self, norm: RmsNorm) -> tuple[Tensor, Norm | None]:
        """A product's input, and the norm that it is yet to take of it."""
        if self._squares is None:
            return self.normed(norm), None
        return self._hidden, Norm(*norm, self._squares)
