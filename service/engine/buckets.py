"""Which decode steps are captured as CUDA graphs when the service starts."""

from __future__ import annotations

from itertools import pairwise, product

from kernels.page import PAGE
from models.decode_step import Bucket

FEWEST_PAGES = 32
"""Width of the narrowest block table: under so many pages a step's time is that of its weights."""


def buckets(
    *,
    dynamic: bool,
    dense_layers: int,
    max_seqs: int,
    max_model_len: int,
    cache_pages: int,
    dense_below: int,
) -> list[Bucket]:
    """A grid of rows and widths, for dense rows and for those that choose their keys by content.

    Budgets are no sizes: each row brings its own.

    Sizes double, so that at most half of a step's rows are padding, which read nothing but weights
    that are read anyway, and at most half of the programs over the longest row's keys find none.
    Twice as many sequences, or twice as long ones, are then one more size: 50 steps for 16
    sequences of 131,072 tokens, in one memory pool that the largest fills. All are captured before
    the service answers: to capture one takes as long as several steps, and the first time to
    compile its kernels, seconds.

    Args:
        dynamic: whether there are rows that choose.
        dense_layers: of the model's layers, the first ones that attend densely nevertheless.
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
        if dynamic and width * PAGE > dense_below:
            found.append(Bucket(batch, width, dynamic, dense_layers))
    return found


def _doubling(first: int, last: int) -> list[tuple[int, int]]:
    """Sizes from `first` to `last`, each with the one before it."""
    sizes = [0]
    while first < last:
        sizes.append(first)
        first *= 2
    return list(pairwise([*sizes, last]))
