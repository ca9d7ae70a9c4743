"""Intervals and paired differences, bootstrapped over documents (Efron 1979, percentiles)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    Scores = Sequence[Sequence[float]]
    """Of each document a total and a count; their ratio is what is of interest."""

DRAWS = 2000
"""Bootstrap samples of an interval."""


def ratio(scores: Scores) -> float:
    """Totals over counts."""
    totals, counts = np.array(scores, dtype=np.float64).T
    return float(totals.sum() / counts.sum())


def interval(*cells: Scores) -> tuple[float, float]:
    """95% interval of the ratio over all cells, their documents drawn anew cell by cell."""
    rng = np.random.default_rng(0)
    totals, counts = np.zeros(DRAWS), np.zeros(DRAWS)
    for scores in cells:
        total, count = np.array(scores, dtype=np.float64).T  # [documents]
        draws = rng.integers(0, len(scores), (DRAWS, len(scores)))
        totals += total[draws].sum(1)
        counts += count[draws].sum(1)
    low, high = np.percentile(totals / counts, (2.5, 97.5))
    return float(low), float(high)


def differences(first: Scores, second: Scores) -> list[list[float]]:
    """Document by document, the first total less the second, with their common count.

    Raises:
        ValueError: the documents are not the same.
    """
    if [one[1] for one in first] != [one[1] for one in second]:
        raise ValueError("paired scores must be of the same documents")
    return [[a[0] - b[0], a[1]] for a, b in zip(first, second, strict=True)]
