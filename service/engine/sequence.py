"""A request in the engine and its sequences, one a choice; pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from kernels.page import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.engine.pages import Content
    from service.engine.stream import Stream
    from service.engine.types import SamplingParams, SparsityParams

TAIL = 128
"""Last tokens of a prompt, where the question stands: they attend under the request's policy."""


class State(StrEnum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """In the queue, without pages."""
    RUNNING = "running"
    """Holds pages; each step computes some of its tokens."""
    FORKING = "forking"
    """Waits for the first choice's prompt, whose pages it will share."""
    FINISHED = "finished"
    """Its last delta is out and its pages are back."""


class Mode(StrEnum):
    """How the token at one position attends."""

    DENSE = "dense"
    DYNAMIC = "dynamic"
    FIXED = "fixed"


class Fallback(StrEnum):
    """Why a token did not attend under the dynamic policy, or a prompt's sparsely."""

    SHORT_CONTEXT = "short_context"
    LOW_COVERAGE = "low_coverage"
    KERNEL_ERROR = "kernel_error"
    OVERLOAD = "overload"
    REQUESTED = "requested"
    OWN_PATTERN = "own_pattern"

    @property
    def to(self) -> Mode:
        """Where such a token goes from the tail on (a policy requested or cut names its own)."""
        return Mode.FIXED if self is Fallback.KERNEL_ERROR else Mode.DENSE


@dataclass(slots=True, eq=False)
class Request:
    """One accepted request; the engine's thread alone changes it."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    sparsity: SparsityParams
    dense_below: int  # context under which the dynamic policy runs dense
    stream: Stream | None  # of the caller; None: nobody reads
    arrived: float  # seconds, monotonic
    sequences: list[Sequence] = field(default_factory=list)  # by choice
    prefill_dense_below: int = 0  # as `dense_below`, of the prompt before its tail
    own_pattern: bool = False  # the model's heads see by patterns: nothing is left to select
    priority: int = 0  # lower is earlier
    cache_salt: str = ""  # the prefix cache's pages are shared among requests of the same one
    # Prompt tokens that it found there when it started; None: not started, or it did not look.
    cached: int | None = None

    @property
    def tail_start(self) -> int:
        """First position that attends under the policy; before it the prompt is prefilled."""
        return max(0, len(self.prompt) - TAIL)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice: its tokens, its pages, and how far it is."""

    request: Request
    index: int  # number of the choice
    tokens: list[int]  # prompt and generated tokens
    state: State = State.WAITING
    # Physical, in order; the scheduler's to change: a list grows, or another takes its place.
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys are cached
    decided: int = 0  # positions before it keep the mode they first ran with, also when recomputed
    # By position, once decided. Before the prompt's tail: of pages, by their first positions, that
    # must not attend as they would otherwise, decided or not.
    fallbacks: dict[int, Fallback] = field(default_factory=dict)
    hold_until: int = 0  # positions before it repeat `hold_reason` instead of trying again
    hold_reason: Fallback = Fallback.LOW_COVERAGE
    # Under brownout, what is left of the request's budget for positions not yet decided (the
    # engine's to set, before each step), and what was left at those decided; None, none: all.
    cut: SparsityParams | None = None
    cuts: dict[int, SparsityParams] = field(default_factory=dict)
    spared: bool = False  # it missed its floor of coverage under a cut, and is cut no more
    # Of the prefix cache, the engine's thread alone fills them in (`service.engine.prefix`).
    keys: list[bytes] = field(default_factory=list)  # of its first pages, as far as asked for
    found: int = 0  # so many first pages are there to begin with, or were when it began
    reused: list[Content] = field(default_factory=list)  # of the pages that it began with
    sealed: bool = False  # its next page is not fit to be kept, nor is any behind it
    started: float | None = None  # first step, seconds, monotonic
    first_token: float | None = None  # first token, seconds, monotonic
    last_token: float | None = None  # newest token, seconds, monotonic

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def unfilled(self) -> int:
        """Known tokens to compute before the next can be sampled; a decode step's one is none.

        What waits need not compute again what the prefix cache has.
        """
        if self.state not in (State.WAITING, State.RUNNING):
            return 0
        left = len(self.tokens) - max(self.computed, self.found * PAGE)
        return left if left > 1 or self.generated == 0 else 0

    def mode(self, position: int) -> Mode:
        """How the token at `position` attends: a function of the position and of what is decided.

        Nothing here depends on the batch, so neither do answers.
        """
        wanted, fallback = self.request.sparsity, self.fallback(position)
        if position < self.request.tail_start:
            return Mode(wanted.prefill) if fallback is None else Mode.DENSE
        if fallback is Fallback.OVERLOAD:
            return Mode(self.wanted(position).policy)
        return Mode(wanted.policy) if fallback in (None, Fallback.REQUESTED) else fallback.to

    def fallback(self, position: int) -> Fallback | None:
        """Why the token at `position` leaves the dynamic policy, or the way of a sparse prompt."""
        if position < self.request.tail_start:  # where the tokens of a page attend alike
            page = position // PAGE * PAGE
            dynamic = self.request.sparsity.prefill == "dynamic"
            if dynamic and self.request.own_pattern:
                return Fallback.OWN_PATTERN
            if dynamic and page < self.request.prefill_dense_below:
                return Fallback.SHORT_CONTEXT
            return self.fallbacks.get(page)
        if self.request.sparsity.policy != "dynamic":
            return Fallback.REQUESTED
        if position < self.decided:
            return self.fallbacks.get(position)
        if self.request.own_pattern:
            return Fallback.OWN_PATTERN
        if position < self.request.dense_below:
            return Fallback.SHORT_CONTEXT
        if position < self.hold_until:
            return self.hold_reason
        return None if self.cut is None else Fallback.OVERLOAD

    def wanted(self, position: int) -> SparsityParams:
        """Where the token at `position` is to look: as the request says, unless it is cut."""
        if self.fallback(position) is not Fallback.OVERLOAD:
            return self.request.sparsity
        if position in self.cuts:
            return self.cuts[position]
        assert self.cut is not None
        return self.cut


def pages_of(positions: range) -> Iterator[range]:
    """Consecutive positions, page by page."""
    start = positions.start
    while start < positions.stop:
        stop = min(positions.stop, start // PAGE * PAGE + PAGE)
        yield range(start, stop)
        start = stop
