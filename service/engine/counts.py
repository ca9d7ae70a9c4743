"""How much an engine has to do: kept by its thread, asked by any."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from service.engine.sequence import State
from service.engine.types import Load
from service.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.engine.scheduler import Scheduler
    from service.engine.sequence import Request


class Counts:
    """The sequences in an engine and its load; safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arriving = 0  # sequences in the inbox
        self._arriving_tokens = 0  # prompt tokens in the inbox
        self._waiting = 0  # sequences that the scheduler has not started
        self._running = 0  # sequences that it has
        self._load = Load()  # after the last step

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        with self._lock:
            return self._arriving + self._waiting

    @property
    def load(self) -> Load:
        """What there is to do, after the last step and with what has arrived since."""
        with self._lock:
            return replace(
                self._load,
                queued_tokens=self._load.queued_tokens + self._arriving_tokens,
                queued_prompts=self._load.queued_prompts + self._arriving,
            )

    def check_room(self, choices: int, most: int) -> None:
        """Whether so many more sequences may come, where at most `most` run and wait.

        Raises:
            OverloadedError: they may not.
        """
        with self._lock:
            waiting = self._arriving + self._waiting
            if waiting + self._running + choices > most:
                raise OverloadedError(f"the queue is full ({waiting} waiting): try again later")

    def arrive(self, choices: int, tokens: int) -> None:
        """A request of so many choices, with a prompt of so many tokens, goes into the inbox."""
        with self._lock:
            self._arriving += choices
            self._arriving_tokens += tokens

    def take(self, choices: int, tokens: int) -> None:
        """It has gone from there to the scheduler."""
        with self._lock:
            self._arriving -= choices
            self._arriving_tokens -= tokens
            self._waiting += choices

    def update(
        self, requests: Iterable[Request], scheduler: Scheduler, prefill_seconds: float
    ) -> None:
        """What there is after a step: requests that have not ended, and where they are."""
        sequences = [sequence for request in requests for sequence in request.sequences]
        waiting = len(scheduler.waiting) + sum(one.state is State.FORKING for one in sequences)
        unfilled = [tokens for sequence in sequences if (tokens := sequence.unfilled)]
        load = Load(
            queued_tokens=sum(unfilled),
            queued_prompts=len(unfilled),
            kv_usage=scheduler.pool.usage,
            slots=len(scheduler.running) / scheduler.limits.max_seqs,
            prefill_seconds=prefill_seconds,
        )
        with self._lock:
            self._load, self._waiting, self._running = load, waiting, len(scheduler.running)
