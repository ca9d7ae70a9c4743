"""Which of a pattern's primitives let a query see a key."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch

from kernels.patterns.expression import Compound, Union
from kernels.patterns.primitive import Primitive

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.expression import Expression


def lit(expression: Expression, query: Tensor, key: Tensor, causal: bool, first: int = 0) -> Tensor:
    """Bit p tells whether primitive p, counted from left to right, is why `query` sees `key`.

    What an intersection allows all of its parts are the reason for; what it refuses none is, though
    some of them allow it. So a number is 0 where, and only where, the pattern allows nothing.

    Args:
        expression: the pattern's.
        query: int64 positions.
        key: int64 positions.
        causal: whether a query sees nothing behind itself.
        first: number of the leftmost primitive.

    Returns:
        int64, broadcast over positions.
    """
    if isinstance(expression, Primitive):
        return expression.allows(query, key, causal).long() << first
    assert isinstance(expression, Compound)
    found = []
    for part in expression.parts:
        found.append(lit(part, query, key, causal, first))
        first += len(part.primitives)
    either = reduce(torch.bitwise_or, found)
    if isinstance(expression, Union):
        return either
    return either.masked_fill_(reduce(torch.logical_or, (bits == 0 for bits in found)), 0)
