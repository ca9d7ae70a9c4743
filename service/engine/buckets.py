"""Which decode steps are captured as CUDA graphs when the service starts."""

from __future__ import annotations

from itertools import product, takewhile
from typing import TYPE_CHECKING

from kernels.page import PAGE
from kernels.policy import Dense
from models.decode_step import Bucket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernels.policy import Dynamic

FEWEST_PAGES = 32
"""Width of the narrowest block table: under so many pages a step's time is that of its weights."""


def buckets(
    dynamic: Dynamic | None,
    dense_layers: int,
    *,
    max_seqs: int,
    max_model_len: int,
    cache_pages: int,
    dense_below: int,
) -> list[Bucket]:
    """A grid of rows and widths, for dense rows and for those of the service's own policy.

    Sizes double, so that at most half of a step's rows are padding, and at most half of its
    programs look for keys behind the last: that costs little beside reading weights and keys.
    Twice as many sequences, or twice as long ones, are then one more size: 65 steps for 16
    sequences of 131,072 tokens, in one memory pool that the largest fills. All are captured before
    the service answers, for capturing one takes as long as several steps, and compiling one's
    kernels, the first time, seconds.

    Args:
        dynamic: the policy of requests that name no numbers of their own; None where it cannot be
            captured.
        dense_layers: its first layers that attend densely.
        max_seqs: sequences that run at once.
        max_model_len: most tokens of a sequence.
        cache_pages: pages of the cache, which sequences share.
        dense_below: context under which rows are dense whatever the policy, tokens.
    """
    batches = _doubling(1, max_seqs)
    widths = _doubling(FEWEST_PAGES, -(-max_model_len // PAGE))
    found = []
    for (fewer, batch), (narrower, width) in product(batches, widths):
        # More than `fewer` rows, one of more than `narrower` pages: each has a page of its own.
        if fewer + narrower >= cache_pages:
            continue
        found.append(Bucket(batch, width))
        if dynamic is not None and width * PAGE > dense_below:
            found.append(Bucket(batch, width, dynamic, dense_layers))
    return found


def _doubling(first: int, last: int) -> list[tuple[int, int]]:
    """Sizes from `first` to `last`, each with the one before it."""
    sizes = [*takewhile(lambda size: size < last, _doubled(first)), last]
    return list(zip([0, *sizes], sizes, strict=False))


def _doubled(size: int) -> Iterator[int]:
    while True:
        yield size
        size *= 2
