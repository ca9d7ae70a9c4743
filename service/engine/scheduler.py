"""Which tokens each step computes: continuous batching with chunked prefill; pure Python."""

from __future__ import annotations

from bisect import insort_left, insort_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernels.page import PAGE
from service.engine.sequence import TAIL, Request, Sequence, State

if TYPE_CHECKING:
    from service.engine.pages import PagePool
    from service.engine.prefix import PrefixCache


@dataclass(frozen=True, slots=True)
class Work:
    """Consecutive tokens of one sequence to compute in a step."""

    sequence: Sequence
    start: int  # position of the first token
    count: int

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the last token's logits choose the sequence's next token."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the queue may hold."""

    max_seqs: int  # sequences that run at a time
    max_queue: int  # sequences that wait
    prefill_chunk: int  # tokens of one prompt prefilled in a step
    step_tokens: int  # tokens of all sequences in a step; at least max_seqs + TAIL


@dataclass(slots=True)
class Scheduler:
    """The lowest priority first, and first come, first served within one; strictly.

    When the cache is full the newest of the highest priority is put back; what runs is never put
    back for what waits. A sequence that is put back loses its pages and is computed anew later, but
    for what the prefix cache still has of it then; how each of its tokens attended is remembered,
    so that it goes on exactly as it would have. What the prefix cache keeps is free to give: it
    never makes anyone wait. Prompts that run together compute what they share once.
    """

    pool: PagePool
    limits: Limits
    cache: PrefixCache | None = None  # over the same pool; None: every prompt is computed
    waiting: list[Sequence] = field(default_factory=list)  # the next one first
    running: list[Sequence] = field(default_factory=list)  # oldest first
    preemptions: int = 0

    def add(self, request: Request, choices: int) -> None:
        """Queue a request; choices behind the first wait for its prompt."""
        for index in range(choices):
            state = State.WAITING if index == 0 else State.FORKING
            request.sequences.append(Sequence(request, index, list(request.prompt), state))
        insort_right(self.waiting, request.sequences[0], key=_priority)

    def schedule(self) -> list[Work]:
        """The next step's work: every running sequence that fits, decode tokens first."""
        if self.cache is not None:
            for sequence in self.waiting:
                self.cache.look(sequence)
        self._admit()
        budget = self.limits.step_tokens
        work: list[Work] = []
        decodes = [s for s in self.running if len(s.tokens) - s.computed == 1]
        prompts = [s for s in self.running if len(s.tokens) - s.computed > 1]
        prompts.sort(key=_priority)
        coming: set[bytes] = set()  # of the pages that prompts compute in this step
        for sequence in (*decodes, *prompts):
            # A sequence scheduled before may have pushed this one out for its pages.
            if sequence.state is not State.RUNNING or self._waits(sequence, coming):
                continue
            count = self._count(sequence, budget)
            if count and self._reserve(sequence, sequence.computed + count):
                if self.cache is not None and (key := self.cache.coming(sequence)) is not None:
                    coming.add(key)
                work.append(Work(sequence, sequence.computed, count))
                budget -= count
        return [item for item in work if item.sequence.state is State.RUNNING]

    def fork(self, request: Request) -> list[tuple[int, int]]:
        """Start the other choices on the pages of the first, whose prompt is computed.

        Each computes the prompt's last token again, in a page of its own where that one is shared
        only in part. Returns (source, target) pages to copy before the next step. Choices that do
        not fit now, or would overtake what is more urgent, queue up like any other.
        """
        first, *others = request.sequences
        urgent = bool(self.waiting) and _priority(self.waiting[0]) < request.priority
        copies: list[tuple[int, int]] = []
        computed = first.prompt_len - 1
        whole, rest = divmod(computed, PAGE)
        for sequence in others:
            if sequence.state is not State.FORKING:
                continue
            sequence.started = first.started
            sequence.decided = first.decided
            sequence.fallbacks = dict(first.fallbacks)
            sequence.hold_until, sequence.hold_reason = first.hold_until, first.hold_reason
            sequence.cuts, sequence.spared = dict(first.cuts), first.spared
            if urgent or len(self.running) >= self.limits.max_seqs or self.pool.free < 1:
                sequence.state = State.WAITING
                insort_right(self.waiting, sequence, key=_priority)
                continue
            shared = first.pages[:whole]
            self.pool.share(shared)
            own = self.pool.take(1)
            if rest:
                copies.append((first.pages[whole], own[0]))
            sequence.pages = [*shared, *own]
            sequence.computed = computed
            sequence.state = State.RUNNING
            self.running.append(sequence)
        return copies

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and its pages back, wherever it is."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    def _admit(self) -> None:
        # Running prompts have yet to take most of their pages; those are not free to give.
        promised = sum(max(0, self._needs(s) - len(s.pages)) for s in self.running)
        while self.waiting and len(self.running) < self.limits.max_seqs:
            sequence = self.waiting[0]
            found = [] if self.cache is None else self.cache.find(sequence)
            promised += self._needs(sequence) - len(found)
            if promised + self.pool.idle(found) > self.pool.free:
                return
            self.waiting.pop(0)
            if self.cache is not None:
                self.cache.begin(sequence, found)
            sequence.state = State.RUNNING
            self.running.append(sequence)

    def _waits(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Whether a prompt that has not begun leaves its next page to one that is in the step.

        It takes over what others have computed since it was admitted. Who it waits for came before
        it or is more urgent, works in this very step, and is not put back for what comes behind: so
        nobody waits where nobody works, and at the latest where the two prompts part it goes on.
        """
        if self.cache is None or not self.cache.may_find(sequence):
            return False
        self.cache.begin(sequence, self.cache.find(sequence))
        return self.cache.coming(sequence) in coming

    def _count(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of `sequence` fit into a step with `budget` tokens left."""
        left = len(sequence.tokens) - sequence.computed
        before_tail = sequence.request.tail_start - sequence.computed
        if before_tail > 0:
            chunk = self.limits.prefill_chunk
            if sequence.request.sparsity.prefill == "dense":
                return min(before_tail, chunk, budget)
            # A page of queries decides together what it reads: it is not cut. The first prompt of a
            # step finds room for one, as the budget has more than a tail's beside all decodes.
            most = min(max(chunk, PAGE), budget)
            return before_tail if before_tail <= most else most // PAGE * PAGE
        # The tail is judged as one: it is never cut, whatever the chunk size. Behind it a
        # sequence that was put back computes its generated tokens again.
        prompt_left = sequence.prompt_len - sequence.computed
        count = prompt_left if prompt_left > 0 else min(left, TAIL)
        return count if count <= budget else 0

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` the pages for `tokens` tokens, putting others back for them."""
        need = self._pages_for(tokens) - len(sequence.pages)
        while need > self.pool.free:
            last = max(enumerate(self.running), key=lambda s: (_priority(s[1]), s[0]))[1]
            self._put_back(last)
            if last is sequence:
                return False
        if need > 0:
            sequence.pages += self.pool.take(need)
        return True

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = sequence.found = 0
        sequence.state = State.WAITING
        insort_left(self.waiting, sequence, key=_priority)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _needs(self, sequence: Sequence) -> int:
        """Pages for what is known of `sequence` and its next token, if there is to be one."""
        last = sequence.prompt_len + sequence.request.sampling.max_tokens
        return self._pages_for(min(len(sequence.tokens) + 1, last))

    @staticmethod
    def _pages_for(tokens: int) -> int:
        return -(-tokens // PAGE)


def _priority(sequence: Sequence) -> int:
    return sequence.request.priority
