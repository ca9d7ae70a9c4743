"""Keys at places that are written out, for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.patterns.expression import Far
from kernels.patterns.primitive import Primitive
from kernels.patterns.view import Run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from kernels.patterns.view import View


@dataclass(frozen=True, slots=True)
class Spans(Primitive):
    """The keys of stretches that depend on the input: a question's tokens, what is no padding.

    In a union these are Longformer's global keys (Beltagy et al. 2020), in an intersection a mask.
    A pattern's text has no form for them: `of` makes them.

    Raises:
        PatternError: the stretches are not ascending and apart, or there are none.
    """

    edges: tuple[tuple[int, int], ...]  # of each stretch its first key, and the end behind its last
    name: ClassVar[str] = "spans"
    form: ClassVar[str] = "spans"
    growth: ClassVar[str] = "s"

    def __post_init__(self) -> None:
        flat = [edge for pair in self.edges for edge in pair]
        if not flat or flat[0] < 0 or any(b <= a for a, b in pairwise(flat)):
            raise PatternError(
                f"stretches of keys must ascend and be apart, not {str(self.edges)[:100]}"
            )

    def __str__(self) -> str:
        return "spans:" + ",".join(f"{begin}-{end}" for begin, end in self.edges)

    @staticmethod
    def of(places: Iterable[int]) -> Spans:
        """The stretches that so many keys make, each place at most once.

        Raises:
            PatternError: there are none.
        """
        edges: list[tuple[int, int]] = []
        for place in sorted(places):
            if edges and edges[-1][1] == place:
                edges[-1] = (edges[-1][0], place + 1)
            else:
                edges.append((place, place + 1))
        return Spans(tuple(edges))

    def sees(self, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Within a stretch, whoever asks."""
        return self._holds(key).broadcast_to((query - key).shape)

    def runs(self, view: View) -> list[Run]:
        """The stretches."""
        starts = torch.zeros_like(view.first)
        return [Run(starts + begin, end - begin) for begin, end in self.edges]

    def code(self, tile: Tensor, page: Tensor, causal: bool) -> Tensor:
        """Nothing of a page, all of it, or what only this page has."""
        held = self._holds(page[..., None] * PAGE + torch.arange(PAGE, device=page.device))
        own = (page + 2).where(held.any(-1), 0)
        return own.masked_fill_(held.all(-1), 1)

    def far(self, causal: bool, tokens: int) -> Far:
        """Everywhere: it depends on the page alone."""
        return Far(0, 1, 0)

    def _holds(self, key: Tensor) -> Tensor:
        edges = torch.tensor(self.edges, device=key.device).flatten()
        return torch.searchsorted(edges, key.contiguous(), right=True) % 2 == 1
