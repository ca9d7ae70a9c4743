"""What is to be expected of a reader who sees some of the votes."""

from __future__ import annotations

from math import comb


def majority_chance(count: int, winner: int, seen: int) -> float:
    """Probability that most of `seen` random votes are the winner's; a tie counts half.

    The winner's votes among those seen are hypergeometric.

    Args:
        count: votes in all.
        winner: of these the winner's.
        seen: 0 to `count`.
    """
    ways = 0
    for right in range(max(0, seen - (count - winner)), min(seen, winner) + 1):
        half_weights = (2 * right > seen) + (2 * right >= seen)  # 2 for more than half, 1 for a tie
        ways += half_weights * comb(winner, right) * comb(count - winner, seen - right)
    return ways / (2 * comb(count, seen))
