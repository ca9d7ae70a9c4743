"""How the number of (query, key) pairs of a pattern grows with the number of tokens n."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, NamedTuple

from kernels.page import PAGE
from kernels.patterns.expression import Compound, Union
from kernels.patterns.primitive import Primitive
from kernels.patterns.random_blocks import Random

if TYPE_CHECKING:
    from kernels.patterns.expression import Expression

RANKS = ("", "sqrt n", "n")
"""What a query sees: keys whose number is constant, grows as a square root, or as n."""


class Growth(NamedTuple):
    """Keys that a query sees; the smaller one grows more slowly, or is the smaller constant."""

    rank: int
    keys: int  # where they are constant
    letters: tuple[str, ...]  # of the numbers that bound them


def formula(expression: Expression) -> str:
    """The class with what its letters stand for, such as "n (g + w) with g = 1, w = 512"."""
    numbers: dict[str, list[str]] = {}
    for primitive in expression.primitives:
        letters = primitive.form.partition(":")[2].split(",")
        for letter, value in zip(letters, astuple(primitive), strict=False):
            numbers.setdefault(letter, []).append(f"{value:,}")
    meant = ", ".join(f"{letter} = {' and '.join(values)}" for letter, values in numbers.items())
    bound = of(expression).removeprefix("O(").removesuffix(")")
    return f"{bound} with {meant}" if meant else bound


def of(expression: Expression) -> str:
    """The class of an expression, such as "O(n w)", "O(n (g + w))", "O(n sqrt n)" or "O(n^2)".

    Letters are those of the primitives' forms. Strides, blocks of `fixed` and the sides of a grid
    count as sqrt n, as Child et al. 2019 choose them; were they constant, the class would be
    O(n^2). Of a union the fastest growing part counts, of an intersection the slowest.
    """
    growth = _growth(expression)
    if growth.rank == RANKS.index("n"):
        return "O(n^2)"
    if growth.rank:
        return f"O(n {RANKS[growth.rank]})"
    each = " + ".join(growth.letters)
    return f"O(n ({each}))" if len(growth.letters) > 1 else f"O(n {each})"


def _growth(expression: Expression) -> Growth:
    if isinstance(expression, Primitive):
        return _of_primitive(expression)
    assert isinstance(expression, Compound)
    parts = [_growth(part) for part in expression.parts]
    if not isinstance(expression, Union):
        return min(parts)
    rank = max(part.rank for part in parts)
    parts = [part for part in parts if part.rank == rank]
    letters = dict.fromkeys(letter for part in parts for letter in part.letters)
    return Growth(rank, sum(part.keys for part in parts), tuple(letters))


def _of_primitive(primitive: Primitive) -> Growth:
    if primitive.growth in RANKS:
        return Growth(RANKS.index(primitive.growth), 0, ())
    keys = astuple(primitive)[0]  # a window's, a block's; of random blocks their number
    return Growth(0, keys * PAGE if isinstance(primitive, Random) else keys, (primitive.growth,))
