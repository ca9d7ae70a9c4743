"""What of a piece of work leaves the way it was to attend, and for how long.

It is kept in the sequence, from which `decide` counts it once it is final.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.page import PAGE
from service.engine.sequence import Fallback, Mode, pages_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.engine.scheduler import Work

HOLD = 32
"""Tokens that stay on a fallback before the dynamic policy is tried again."""
PROMPT_HOLD = 32 * PAGE
"""The same of a prompt before its tail: each time it is tried costs a step more."""


def hold(item: Work, reason: Fallback) -> None:
    """Send the item's undecided tokens, and `HOLD` more, to the fallback for `reason`."""
    item.sequence.hold_reason = reason
    item.sequence.hold_until = item.stop + HOLD


def spare(item: Work) -> None:
    """Give the item's undecided tokens, and all behind them, their whole budget again."""
    item.sequence.cut, item.sequence.spared = None, True


def body_of(item: Work) -> range:
    """Positions of the item's tokens that are of the prompt before its tail."""
    return range(item.start, max(item.start, min(item.stop, item.sequence.request.tail_start)))


def prefills_sparsely(item: Work) -> bool:
    """Whether some of these do not attend densely."""
    mode = item.sequence.mode
    return any(mode(page.start) is not Mode.DENSE for page in pages_of(body_of(item)))


def hold_prompt(item: Work, start: int, reason: Fallback) -> int:
    """Have a prompt attend densely from the page of `start` on, also when it is computed again.

    Up to its tail where something failed, that would fail at every try; else for `PROMPT_HOLD`.

    Returns:
        Up to which position.
    """
    sequence, stop = item.sequence, item.sequence.request.tail_start
    if reason is not Fallback.KERNEL_ERROR:
        stop = min(stop, start + PROMPT_HOLD)
    for page in range(start // PAGE * PAGE, stop, PAGE):
        sequence.fallbacks.setdefault(page, reason)
    return stop


def is_sparse(item: Work) -> bool:
    """Whether some of the item's tokens attend to selected keys."""
    sequence = item.sequence
    first = max(item.start, sequence.request.tail_start)
    return any(sequence.mode(at) is not Mode.DENSE for at in range(first, item.stop))


def held_by_error(item: Work) -> bool:
    """Whether its tail or generated tokens are on the fallback for a failed selection."""
    sequence = item.sequence
    return sequence.hold_reason is Fallback.KERNEL_ERROR and item.start < sequence.hold_until


def prompt_held_by_error(item: Work) -> bool:
    """The same of a prompt's tokens before its tail."""
    fallback = item.sequence.fallback
    return any(fallback(page.start) is Fallback.KERNEL_ERROR for page in pages_of(body_of(item)))


def dynamic_rows(item: Work) -> list[int]:
    """Places within the item of the undecided tokens that attend dynamically."""
    sequence = item.sequence
    first = max(item.start, sequence.request.tail_start, sequence.decided)
    return [
        position - item.start
        for position in range(first, item.stop)
        if sequence.mode(position) is Mode.DYNAMIC
    ]


def decide(item: Work, note: Callable[[Fallback, Mode, int], None]) -> int:
    """Fix how the item's tokens attended, for good; `note` hears why how many went where.

    Returns:
        How many of the item's first tokens had been decided before or are not under the policy.
    """
    sequence = item.sequence
    fresh = max(item.start, sequence.decided)
    for page in pages_of(range(fresh, body_of(item).stop)):
        reason = sequence.fallback(page.start)
        if reason is not None:
            note(reason, sequence.mode(page.start), len(page))
    first = max(fresh, sequence.request.tail_start)
    for position in range(first, item.stop):
        reason = sequence.fallback(position)
        if reason is not None:
            sequence.fallbacks[position] = reason
            if reason is Fallback.OVERLOAD:
                sequence.cuts[position] = sequence.wanted(position)
            note(reason, sequence.mode(position), 1)
    sequence.decided = max(sequence.decided, item.stop)
    return max(0, min(first, item.stop) - item.start)
