"""Passages whose tokens a model predicts, given what stands before them.

Nothing is asked: the last tokens of a context are predicted one by one, and what is measured is
how many bits they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from service.eval.source import Source

LONGEST = 66_000
"""Tokens before a passage: the most that a context can hold, so that all contexts end alike."""
CONTINUED = 512
"""Tokens of a passage of running text."""
REPEATED = 64
"""Tokens of a repeated passage."""
RECOGNISED = 6
"""Of a repeated passage so many tokens are not counted: that it is a repetition shows in them."""
AWAY = 1024
"""Fewest tokens from where a repeated passage first stands to where it is repeated."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A context that ends in the tokens to predict.

    Attributes:
        tokens: without special tokens.
        targets: how many of the last tokens are predicted.
        skipped: how many of the first targets are not counted.
    """

    tokens: tuple[int, ...]
    targets: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class PassageTask:
    """A kind of passage.

    Attributes:
        make: from a generator, a source and the context's tokens. A generator in the same state
            ends contexts of all lengths at the same place of the same text.
    """

    name: str
    make: Callable[[np.random.Generator, Source, int], Passage]


def continued(rng: np.random.Generator, source: Source, tokens: int) -> Passage:
    """Running text, of which the last 512 tokens are predicted: the same in every context.

    Raises:
        ConfigError: there is not so much text.
    """
    text, _, place = place_in(rng, source, tokens - CONTINUED)
    return Passage(tuple(text[place - (tokens - CONTINUED) : place + CONTINUED]), targets=CONTINUED)


def repeated(rng: np.random.Generator, source: Source, tokens: int) -> Passage:
    """Running text, and behind it again 64 tokens that stand at a random depth of it.

    Raises:
        ConfigError: there is not so much text, or the context is too short to repeat anything.
    """
    before = tokens - REPEATED
    text, starts, place = place_in(rng, source, before)
    # Whole sentences alone begin a repetition, and the depth is the same share of every context.
    able = [start for start in starts if place - before <= start <= place - AWAY]
    if not able:
        raise ConfigError(f"the task repeats needs contexts of 2048 tokens or more, not {tokens}")
    wanted = place - before + rng.random() * (before - AWAY)
    start = min(able, key=lambda one: abs(one - wanted))
    span = text[start : start + REPEATED]
    return Passage((*text[place - before : place], *span), targets=REPEATED, skipped=RECOGNISED)


def place_in(
    rng: np.random.Generator, source: Source, before: int
) -> tuple[list[int], list[int], int]:
    """A text's tokens, where its sentences begin, and a sentence with enough text around it."""
    if before > LONGEST:
        raise ConfigError(f"a text task reaches back {LONGEST} tokens, not {before}")
    pieces = source.long_text(rng, LONGEST + CONTINUED)
    text = list(chain.from_iterable(pieces))
    starts = list(accumulate(map(len, pieces), initial=0))[:-1]
    fitting = [start for start in starts if start + CONTINUED <= len(text)]
    able = [start for start in fitting if start >= LONGEST] or fitting[-1:]
    place = able[int(rng.integers(len(able)))] if able else 0
    if place < before:
        raise ConfigError(
            f"the longest text has {place} tokens before what is to be predicted, and the context "
            f"needs {before}: ask for shorter contexts, or name a --text-dir with longer texts"
        )
    return text, starts, place
