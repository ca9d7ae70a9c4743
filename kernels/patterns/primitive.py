"""A primitive: one rule of who sees whom, and what follows from it for lists of keys and pages."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import astuple, dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, ClassVar

from kernels.errors import PatternError
from kernels.patterns.expression import Expression
from kernels.patterns.view import Bounds, Cover

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from torch import Tensor

    from kernels.patterns.view import Run, View

LARGEST = 1 << 31
"""The largest number that a primitive takes."""


@dataclass(frozen=True, slots=True)
class Primitive(Expression):
    """A rule, `sees`, and three things derived from it, which tests check against it.

    `runs` says where the keys lie that some queries see, `code` which pages look alike, and `far`
    where that repeats. The fields of a primitive are its numbers in the order of their spelling.

    Raises:
        PatternError: a number lies outside its range.
    """

    name: ClassVar[str]
    form: ClassVar[str]  # how it is written
    growth: ClassVar[str]  # keys a query sees: a letter where they are constant, "sqrt n" or "n"
    example: ClassVar[tuple[int, ...]]  # numbers that show it among some hundred tokens
    by_distance: ClassVar[bool] = False  # whether q - k alone decides

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = self.least(field.name), getattr(self, field.name)
            if not least <= value <= LARGEST:
                raise PatternError(
                    f"{field.name} of {self.form} must lie in {least} to {LARGEST}, not {value}"
                )

    def __str__(self) -> str:
        numbers = ",".join(map(str, astuple(self)))
        return f"{self.name}:{numbers}" if numbers else self.name

    @staticmethod
    def least(field: str) -> int:
        """The smallest number that a field takes; the largest one is `LARGEST`."""
        return 0 if field == "seed" else 1

    @abstractmethod
    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """The rule itself: bool, broadcast over int64 positions.

        In a causal pattern what it says of a key behind the query does not matter.
        """

    @abstractmethod
    def runs(self, view: View) -> list[Run]:
        """Stretches in which all keys lie that the view's rows see."""

    @abstractmethod
    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """A number from 0 on for tiles of queries and pages of keys.

        Where it is the same, each query of the tile sees the same keys of the page by `sees`,
        wherever tile and page are. In a causal pattern that holds apart for pages before the tile,
        for its own and for those behind.

        Args:
            tile: int64, position // 64 of the queries.
            page: int64, position // 64 of the keys, of the same shape.
            causal: whether the pattern is.
        """

    def allows(self, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
        """Whether `query` may see `key`: bool, broadcast over int64 positions from 0."""
        seen = self.sees(query, key, causal)
        return seen & (key <= query) if causal else seen

    def joined(self, of: Callable[[Primitive], Tensor]) -> Tensor:
        """What `of` says of it."""
        return of(self)

    def cover(self, view: View) -> Cover:
        """Its runs."""
        runs = self.runs(view)
        return Cover(tuple((run, view) for run in runs), sum(run.columns(view) for run in runs))

    def bounds(self, view: View) -> Bounds:
        """From the first key of any run to the last of any."""
        return reduce(Bounds.around, (run.bounds for run in self.runs(view)))

    @property
    def keeps_previous(self) -> bool:
        """Whether every query sees the key before it; of most primitives some do not."""
        return False

    @property
    def primitives(self) -> tuple[Self, ...]:
        """Itself."""
        return (self,)
