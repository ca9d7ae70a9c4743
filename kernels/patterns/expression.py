"""What a pattern is made of: an expression of primitives, unions and intersections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from operator import and_, attrgetter, or_
from typing import TYPE_CHECKING, NamedTuple

from kernels.errors import PatternError
from kernels.patterns.view import Bounds, Cover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    def joined(self, of: Callable[[Primitive], Tensor]) -> Tensor:
        """What `of` says of the primitives, bools or sets of bits, joined as they are."""

    def allows(self, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
        """Whether `query` may see `key`: bool, broadcast over int64 positions from 0.

        Args:
            query: int64 positions.
            key: int64 positions.
            causal: whether a query sees nothing behind itself.
        """
        return self.joined(lambda primitive: primitive.allows(query, key, causal))

    @abstractmethod
    def cover(self, view: View) -> Cover:
        """Where all keys lie that the view's rows see, and perhaps others.

        Each part is asked once for each view: within each other parts could otherwise take time
        exponential in their depth.
        """

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

    def joined(self, of: Callable[[Primitive], Tensor]) -> Tensor:
        """What is so of any part."""
        return reduce(or_, (part.joined(of) for part in self.parts))

    def cover(self, view: View) -> Cover:
        """All parts' runs."""
        return Cover.of(part.cover(view) for part in self.parts)

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

    def joined(self, of: Callable[[Primitive], Tensor]) -> Tensor:
        """What is so of every part."""
        return reduce(and_, (part.joined(of) for part in self.parts))

    def cover(self, view: View) -> Cover:
        """The runs of the part that lists the fewest units where all of them see anything."""
        view = self._narrow(view)
        covers = [_smallest(self.parts, view)]
        alone = [part for part in self.parts if len(part.primitives) == 1]
        for part in self.parts:
            # A union may be wide of which each part is narrow. Only one of primitives is taken
            # apart: within each other that would take exponential time.
            if isinstance(part, Union) and all(len(x.primitives) == 1 for x in part.parts):
                narrows = ((x, view.within(x.bounds(view))) for x in part.parts)
                covers.append(Cover.of(_smallest((x, *alone), narrow) for x, narrow in narrows))
        return min(covers, key=attrgetter("columns"))

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


def _smallest(parts: Iterable[Expression], view: View) -> Cover:
    return min((part.cover(view) for part in parts), key=attrgetter("columns"))
