"""Diagonals that repeat: where a tile meets keys at multiples of a step from its queries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

RESIDUES = 2 * PAGE + 1
"""Codes that `residue` may give."""


def residue(distance: Tensor, step: int) -> Tensor:
    """A code for the diagonals of a tile and a page, whose first positions are `distance` apart.

    A query and a key of theirs are between 63 less and 63 more apart, so that for a long step only
    remainders near 0 or near the step leave any diagonal.
    """
    rest = distance % step
    near = (step - rest).clamp_max_(PAGE) + PAGE
    return rest.where(rest < PAGE, near)


def period_of(step: int) -> int:
    """After how many tiles diagonals a step apart lie in pages as before."""
    return step // math.gcd(step, PAGE)
