"""From what a token's heads attended to, to what an answer says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from models.explain import Wanted
from service.engine.types import Head, Span, TokenLook

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray

    from models.explain import Glance
    from service.engine.tally import Looked
    from service.engine.types import Explain

TOP = 16
"""Keys of a head that are told of a token."""
ENTRIES = 4096
"""Keys of all heads that are told of a token, about: where there are many heads, fewer of each."""
SPANS = 16
"""Passages that an answer names."""
PEAKS = 96
"""Keys of the greatest weights, of which passages are made."""
GAP = 4
"""Tokens between two of them within a passage, at most."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One token's look, and the weight of every key behind it."""

    look: TokenLook
    spread: NDArray[np.float64]  # [visible]  mean over the layers and heads that count


@dataclass(slots=True)
class Passages:
    """The weights of a prompt's keys, summed up over an answer's tokens."""

    prompt: int
    tokens: int = 0
    mass: NDArray[np.float64] = field(init=False)  # [prompt]

    def __post_init__(self) -> None:
        self.mass = np.zeros(self.prompt)

    def add(self, explained: Explained) -> None:
        """Count one more token."""
        self.tokens += 1
        part = explained.spread[: self.prompt]
        self.mass[: len(part)] += part

    def spans(self, text: Callable[[int, int], str]) -> tuple[Span, ...]:
        """The passages with the most mass, that first.

        Args:
            text: of the prompt's tokens from a position up to another.
        """
        peaks = np.argsort(-self.mass, kind="stable")[:PEAKS]
        peaks = np.sort(peaks[self.mass[peaks] > 0])
        edges = np.flatnonzero(np.diff(peaks) > GAP) + 1
        found = [(int(run[0]), int(run[-1]) + 1) for run in np.split(peaks, edges) if len(run)]
        found.sort(key=lambda span: -float(self.mass[span[0] : span[1]].sum()))
        return tuple(
            Span(start, end, text(start, end), float(self.mass[start:end].sum()) / self.tokens)
            for start, end in found[:SPANS]
        )


def wanted(explain: Explain, layers: int, heads: int) -> Wanted:
    """What the model is to note of a token, bounded in size.

    Args:
        explain: what the request asks for.
        layers: of the model.
        heads: query heads of a layer.
    """
    chosen = len(explain.layers or range(layers)) * len(explain.heads or range(heads))
    top = max(1, min(TOP, ENTRIES // chosen)) if explain.tokens else 1
    return Wanted(
        top=top,
        layers=None if explain.layers is None else frozenset(explain.layers),
        heads=explain.heads,
    )


def of_token(glances: Seq[Glance], looked: Looked, place: int, visible: int) -> Explained:
    """What one token's heads attended to.

    Args:
        glances: of this token, layer by layer.
        looked: what the step's tokens looked at, of the token's sequence.
        place: of the token among these.
        visible: keys that it saw.
    """
    spread = np.zeros(visible)
    heads = []
    for one in glances:
        spread += one.spread.double().cpu().numpy()
        rows = zip(
            one.heads,
            one.keys.tolist(),
            one.position.tolist(),
            one.weight.double().tolist(),
            strict=True,
        )
        for head, keys, positions, weights in rows:
            some = [(at, w) for at, w in zip(positions, weights, strict=True) if w > 0]
            coverage = float(np.nan_to_num(looked.coverage[one.layer, place, head]))
            heads.append(
                Head(
                    layer=one.layer,
                    head=head,
                    keys=keys,
                    coverage=min(1.0, coverage),
                    positions=tuple(at for at, _ in some),
                    weights=tuple(w for _, w in some),
                )
            )
    look = TokenLook(
        visible=visible,
        density=float(looked.density[:, place].mean()),
        coverage=float(np.nan_to_num(looked.coverage[:, place]).mean()),
        heads=tuple(heads),
    )
    return Explained(look, spread / max(1, len(glances)))
