"""Rows of queries, the keys among which they look, and the stretches of keys that they may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

FOREVER = 1 << 62
"""A position behind every key."""


class Bounds(NamedTuple):
    """Between which keys a row's queries see anything."""

    low: Tensor  # int64 [rows, 1]  no key before it is seen
    high: Tensor  # int64 [rows, 1]  nor any behind it

    def around(self, other: Bounds) -> Bounds:
        """What holds both."""
        return Bounds(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


@dataclass(frozen=True, slots=True)
class View:
    """Rows of consecutive queries, and the range of keys that counts for each.

    Keys are listed by unit: a single key where a row is one query, a page where it is a tile.
    """

    first: Tensor  # int64 [rows, 1]  first query
    low: Tensor  # int64 [rows, 1]  first key that counts
    high: Tensor  # int64 [rows, 1]  last one; before `low` where none does
    size: int  # queries of a row, and keys of a unit; both begin at a multiple of it
    span: int  # no row has more keys that count
    earliest: int  # no query lies before it
    latest: int  # no row begins behind it, and no key that counts lies there
    causal: bool

    def within(self, bounds: Bounds) -> View:
        """The same rows, with only the keys inside of the bounds."""
        low = torch.maximum(self.low, bounds.low)
        high = torch.minimum(self.high, bounds.high)
        span = max(int((high - low).max()) + 1, 0) if len(low) else 0
        return replace(self, low=low, high=high, span=span)


@dataclass(frozen=True, slots=True)
class Run:
    """Stretches of keys, of equal width, in which all lie that a row's queries see.

    They are listed, or they are a progression without end, or of `count` stretches.
    """

    starts: Tensor  # int64 [rows, stretches]  of a progression [rows, 1], its first
    width: int
    step: int = 0  # from one stretch of a progression to the next
    count: int = FOREVER
    stop: Tensor | None = None  # int64 [rows, 1]  no stretch reaches it; None: no end but its own

    @property
    def bounds(self) -> Bounds:
        """Between which keys the stretches lie."""
        if not self.starts.shape[1]:
            nowhere = self.starts.new_zeros(len(self.starts), 1)
            return Bounds(nowhere, nowhere - 1)
        high = self.starts.amax(1, keepdim=True) + (self._length - 1)
        return Bounds(
            low=self.starts.amin(1, keepdim=True),
            high=high if self.stop is None else torch.minimum(high, self.stop - 1),
        )

    def columns(self, view: View) -> int:
        """How many places `units` takes in a row."""
        run = self._joined(view)
        return run._stretches(view) * run._units_each(view)

    def units(self, view: View) -> Tensor:
        """The units in which the stretches lie.

        Returns:
            int64 [rows, columns], `FOREVER` where there is none; some may repeat.
        """
        run = self._joined(view)
        starts, there = run.starts, None
        if run.step:
            skipped = (view.low - run.width - starts).div(run.step, rounding_mode="floor") + 1
            number = torch.arange(run._stretches(view), device=starts.device)
            number = number + skipped.clamp_min(0)  # [rows, stretches]
            starts, there = starts + number * run.step, number < run.count
        low = torch.maximum(starts, view.low)
        high = torch.minimum(starts + (run.width - 1), view.high)  # [rows, stretches]
        if run.stop is not None:
            high = torch.minimum(high, run.stop - 1)
        some = low <= high if there is None else (low <= high) & there
        unit = torch.arange(run._units_each(view), device=starts.device)
        unit = unit + low.div(view.size, rounding_mode="floor")[..., None]
        last = high.div(view.size, rounding_mode="floor").where(some, -1)
        return unit.masked_fill_(unit > last[..., None], FOREVER).flatten(1)

    def _joined(self, view: View) -> Run:
        """A progression whose stretches leave no unit out, as one stretch."""
        if not self.step or self.step > self._units_each(view) * view.size:
            return self
        return Run(self.starts, self._length, stop=self.stop)

    @property
    def _length(self) -> int:
        """Keys from the first of a stretch, or of a progression, to its last."""
        return min(FOREVER, (self.count - 1) * self.step + self.width) if self.step else self.width

    def _stretches(self, view: View) -> int:
        if not self.step:
            return self.starts.shape[1]
        return min(self.count, (view.span + self.width - 2) // self.step + 1)

    def _units_each(self, view: View) -> int:
        most = (min(self.width, view.span) + view.size - 2) // view.size + 1
        if view.size > 1 and self.step % view.size == 0 and self.starts.numel():
            # They begin at the same place in a unit, which may spare one.
            place = int((self.starts % view.size).max())
            most = min(most, (place + self.width - 1) // view.size + 1)
        return most


class Cover(NamedTuple):
    """Runs in which all keys lie that some rows see, each with the keys that count there."""

    pieces: tuple[tuple[Run, View], ...]
    columns: int  # places that `units` takes in a row

    @staticmethod
    def of(parts: Iterable[Cover]) -> Cover:
        """What several cover together."""
        covers = tuple(parts)
        pieces = tuple(piece for cover in covers for piece in cover.pieces)
        return Cover(pieces, sum(cover.columns for cover in covers))

    def units(self) -> Tensor:
        """The units in which the runs lie.

        Returns:
            int64 [rows, columns], `FOREVER` where there is none; some may repeat.
        """
        return torch.cat([run.units(view) for run, view in self.pieces], dim=1)
