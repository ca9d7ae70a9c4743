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


def survivors(
    score: list[float], visible: int, number: list[int], sure: int, stratum: int, far: int
) -> list[int]:
    """For how many pages each of a segment's stands, of one row and KV head.

    Pages whose means score highest are read for certain, and of each `stratum` that follow in that
    order one, which stands for all of them. (Neyman 1938, "Contribution to the Theory of Sampling
    Human Populations": two phases.)

    Args:
        score: of each page.
        visible: keys that the row sees.
        number: which of each stratum is read.
        sure: pages that are read for certain.
        stratum: pages of a stratum.
        far: keys that a row sees at the least, else it reads all pages.

    Returns:
        Of each page 1, `stratum`, or 0 where it is not read.
    """
    if visible < far:
        return [1] * len(score)
    ranked = sorted(range(len(score)), key=lambda page: (-score[page], page))
    stands = [0] * len(score)
    for page in ranked[:sure]:
        stands[page] = 1
    for index, drawn in enumerate(number):
        stands[ranked[sure + index * stratum + drawn]] = stratum
    return stands


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
