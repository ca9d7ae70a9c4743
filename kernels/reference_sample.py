"""The specification of decode's budget and sample, of one row and KV head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.policy import Dynamic


def marks(
    share: Tensor,
    held: float,
    always: int,
    visible: int,
    policy: Dynamic,
    fewest: int,
    each: int,
) -> int:
    """The budget of one row and KV head: marks on its line, see `marked`.

    With K marks a key of share w is read with probability min(1, K w), so the keys read carry
    the sum of w min(1, K w), on average.

    Args:
        share: [probed], estimated shares of the row's attention mass.
        held: share of the keys that are always read.
        always: how many these are.
        visible: keys that the row sees.
        policy: the bounds and targets.
        fewest: fewest marks, whatever the policy says.
        each: keys for which a probed one stands.

    Returns:
        K.
    """

    def expected(number: int) -> tuple[float, float]:
        keys, mass = 0.0, held
        for one in share.tolist():
            met = min(1.0, number * one)
            keys += each * met
            mass += each * met * one
        return keys, mass

    most = max(policy.max_keys - always, fewest)
    number = min(max(policy.min_keys - always, fewest, 1), most)
    while number < most:
        more = min(2 * number, most)
        keys, mass = expected(number)
        keys_of_more, mass_of_more = expected(more)
        average = (keys_of_more - keys) / visible  # what so many keys carry of level attention
        if mass >= policy.coverage or mass_of_more - mass < policy.worth * average:
            break
        number = more
    return number


def marked(length: Tensor, start: list[int], pages: int, distance: int) -> list[int]:
    """The sample of one row and KV head: systematic, with probability proportional to size.

    Madow 1949, "On the Theory of Systematic Sampling, II": keys lie side by side, there is a mark
    at every multiple of `distance`, and a key is in the sample where a mark falls on it. See
    `kernels.sample`.

    Args:
        length: int64 [keys], whole pages.
        start: where each segment's line begins, 0 to `distance` - 1.
        pages: of a segment.
        distance: between marks; no key is longer.

    Returns:
        The keys, ascending.
    """
    lengths, found = length.tolist(), []
    for segment, phase in enumerate(start):
        end = phase
        first, last = segment * pages, min((segment + 1) * pages, len(lengths) // PAGE)
        for page in range(first, last):
            for column in range(8):
                for key in range(page * PAGE + column, (page + 1) * PAGE, 8):
                    begin, end = end, end + lengths[key]
                    if end // distance > begin // distance:
                        found.append(key)
    return sorted(found)
