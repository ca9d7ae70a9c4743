"""What a pattern is made of: an expression of primitives, unions and intersections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from kernels.errors import PatternError
from kernels.patterns.view import Bounds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from kernels.patterns.primitive import Primitive
    from kernels.patterns.view import View


class Far(NamedTuple):
    """Where masks repeat.

    From tile `first` on, what tiles see of a page that lies at least `reach` pages before them is
    the same for all whose number is the same modulo `period`. So is what they see of a page that
    lies as far behind them.
    """

    first: int
    period: int  # 0: nothing repeats
    reach: int


class Expression(ABC):
    """Which keys a query sees by position alone."""

    __slots__ = ()

    @abstractmethod
    def allows(self, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
        """Whether `query` may see `key`: bool, broadcast over int64 positions from 0.

        Args:
            query: int64 positions.
            key: int64 positions.
            causal: whether a query sees nothing behind itself.
        """

    @abstractmethod
    def units(self, view: View) -> list[Tensor]:
        """Units that hold every key that the view's rows see, and perhaps others.

        Returns:
            int64 [rows, n] each, `FOREVER` where there is none; some may repeat.
        """

    @abstractmethod
    def columns(self, view: View) -> int:
        """How many places `units` takes in a row."""

    @abstractmethod
    def bounds(self, view: View) -> Bounds:
        """Between which keys the view's rows see anything."""

    @abstractmethod
    def far(self, causal: bool, tokens: int) -> Far:
        """Where masks repeat, if there are so many tokens."""

    @property
    @abstractmethod
    def keeps_previous(self) -> bool:
        """Whether every query sees the key before it, however many there are."""

    @property
    @abstractmethod
    def primitives(self) -> tuple[Primitive, ...]:
        """The primitives, from left to right."""


@dataclass(frozen=True, slots=True)
class Compound(Expression):
    """Two or more expressions that one operator joins; one of its own kind among them dissolves.

    Raises:
        PatternError: there are fewer than two.
    """

    parts: tuple[Expression, ...]

    def __post_init__(self) -> None:
        flat: list[Expression] = []
        for part in self.parts:
            flat += (
                part.parts if isinstance(part, Compound) and type(part) is type(self) else [part]
            )
        if len(flat) < 2:
            raise PatternError("a union or an intersection needs two patterns or more")
        object.__setattr__(self, "parts", tuple(flat))

    @property
    def primitives(self) -> tuple[Primitive, ...]:
        """The primitives, from left to right."""
        return tuple(leaf for part in self.parts for leaf in part.primitives)

    def far(self, causal: bool, tokens: int) -> Far:
        """Where the masks of all parts repeat."""
        found = [part.far(causal, tokens) for part in self.parts]
        firsts, periods, reaches = zip(*found, strict=True)
        return Far(max(firsts), math.lcm(*periods), max(reaches))


@dataclass(frozen=True, slots=True)
class Union(Compound):
    """What any of the parts allows, written `a+b`."""

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    def allows(self, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
        """Whether any part lets `query` see `key`."""
        allowed = self.parts[0].allows(query, key, causal)
        for part in self.parts[1:]:
            allowed = allowed | part.allows(query, key, causal)
        return allowed

    def units(self, view: View) -> list[Tensor]:
        """The units of all parts."""
        return [units for part in self.parts for units in part.units(view)]

    def columns(self, view: View) -> int:
        """How many places `units` takes in a row."""
        return sum(part.columns(view) for part in self.parts)

    def bounds(self, view: View) -> Bounds:
        """From the first key of any part to the last of any."""
        return reduce(Bounds.around, (part.bounds(view) for part in self.parts))

    @property
    def keeps_previous(self) -> bool:
        """Whether one part does: what each leaves out, all leave out somewhere."""
        return any(part.keeps_previous for part in self.parts)


@dataclass(frozen=True, slots=True)
class Intersection(Compound):
    """What every one of the parts allows, written `a&b`."""

    def __str__(self) -> str:
        return "&".join(f"({x})" if isinstance(x, Union) else str(x) for x in self.parts)

    def allows(self, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
        """Whether every part lets `query` see `key`."""
        allowed = self.parts[0].allows(query, key, causal)
        for part in self.parts[1:]:
            allowed = allowed & part.allows(query, key, causal)
        return allowed

    def units(self, view: View) -> list[Tensor]:
        """The units of the part that has the fewest where all of them see anything."""
        return [units for part, narrow in self._fewest(view) for units in part.units(narrow)]

    def columns(self, view: View) -> int:
        """How many places `units` takes in a row."""
        return sum(part.columns(narrow) for part, narrow in self._fewest(view))

    def bounds(self, view: View) -> Bounds:
        """Where the bounds of all parts overlap."""
        view = self._narrow(view)
        return Bounds(view.low, view.high)

    @property
    def keeps_previous(self) -> bool:
        """Whether all parts do."""
        return all(part.keeps_previous for part in self.parts)

    def _narrow(self, view: View) -> View:
        for part in self.parts:
            view = view.within(part.bounds(view))
        return view

    def _fewest(self, view: View) -> list[tuple[Expression, View]]:
        """Parts whose units hold all that is seen, each with where to list them."""
        view = self._narrow(view)
        found = [[_cheapest(self.parts, view)]]
        for part in self.parts:
            # A union may be wide of which each part is narrow. Only one of primitives is taken
            # apart: within each other that would take exponential time.
            if isinstance(part, Union) and all(len(x.primitives) == 1 for x in part.parts):
                others = [x for x in self.parts if len(x.primitives) == 1]
                narrows = ((x, view.within(x.bounds(view))) for x in part.parts)
                found.append([_cheapest((x, *others), narrow) for x, narrow in narrows])
        return min(found, key=lambda pieces: sum(x.columns(narrow) for x, narrow in pieces))


def _cheapest(parts: Iterable[Expression], view: View) -> tuple[Expression, View]:
    return min(parts, key=lambda part: part.columns(view)), view
