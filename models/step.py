"""One engine step as the model sees it: a flat list of tokens and how each of them attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threading import Event

    from torch import Tensor

    from kernels.cache import Rows, Segment
    from kernels.policy import Dynamic, Fixed, Pages


@dataclass(frozen=True, slots=True)
class DenseRows:
    """Single tokens of several sequences that attend densely."""

    rows: Rows
    tokens: Tensor  # int64 [rows]  place of each row in the step


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """Consecutive tokens of one sequence that attend densely."""

    segment: Segment
    first: int  # place of the segment's first token in the step; the rest follow it


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Consecutive tokens of one sequence, a part of its prompt, that read some pages of keys."""

    segment: Segment
    first: int  # place of the segment's first token in the step; the rest follow it
    policy: Pages | Fixed
    dense_layers: int = 0  # the model's first layers, which attend densely nevertheless


@dataclass(frozen=True, slots=True)
class SparseGroup:
    """Tokens that go through selected attention under one policy, the same number a sequence."""

    rows: Rows
    tokens: Tensor  # int64 [rows]  place of each row in the step
    policy: Dynamic | Fixed
    dense_layers: int = 0  # the model's first layers, which attend densely nevertheless


@dataclass(frozen=True, slots=True)
class Turn:
    """A step's place among others that go through the layers at the same time."""

    done: tuple[Event, ...]  # [layers]  set when the step's keys are in the layer's cache
    before: Turn | None  # of the step whose tokens stand before its own

    def take(self, layer: int) -> None:
        """Tell that the layer's keys are written, and wait for those of all steps before."""
        self.done[layer].set()
        other = self.before
        while other is not None:
            other.done[layer].wait()
            other = other.before


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one forward pass computes. Every token stands in exactly one group."""

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    slots: Tensor  # int64 [tokens]  where each token's key goes: physical page * 64 + offset
    filled: Tensor  # int64 [pages]  physical pages whose last key this step writes
    dense: tuple[DenseGroup, ...]
    alone: DenseRows | None
    sparse: tuple[SparseGroup, ...]
    tiled: tuple[TileGroup, ...] = ()
    turn: Turn | None = None  # where it is a part of a step (`models.wave`)
