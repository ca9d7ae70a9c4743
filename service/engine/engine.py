"""The engine: accepts requests from any thread and advances them all in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from service.engine.admission import check_explain, check_request
from service.engine.answers import Answers
from service.engine.brownout import Brownout
from service.engine.counts import Counts
from service.engine.measures import longest_wait, observe
from service.engine.output import Ending
from service.engine.prefix import PrefixCache
from service.engine.scheduler import Limits, Scheduler, Work
from service.engine.sequence import Request, Sequence, State
from service.engine.stream import Stream
from service.engine.types import Health, Load, SamplingParams, SparsityParams
from service.errors import EngineDeadError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from models.config import ModelConfig
    from models.tokenizer import Tokenizer
    from service.engine.pages import PagePool
    from service.engine.runner import Runner
    from service.engine.tally import Looked, Prefilled
    from service.metrics import Metrics

IDLE_BEAT = 0.5
"""Seconds between heartbeats of an idle engine."""
STALE_BEAT = 120.0
"""Seconds without a heartbeat after which the engine counts as dead: longer than any step."""

_log = logging.getLogger("saccade.engine")


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class Engine:
    """One model, its KV cache and the step loop.

    Args:
        runner: executes steps on the model.
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        metrics: where the engine reports.
        pool: the KV pages, as many as the runner's caches have.
        limits: bounds of a step and of the queue.
        model_name: the name requests use.
        max_model_len: most tokens of a prompt and its answer; must fit the pool.
        dense_below: context under which the dynamic policy runs dense, tokens.
        prefill_dense_below: the same of prompts before their tail.
        prefix_cache: whether what was computed of a prompt is kept for others that begin alike.
        brownout: what cuts budgets under overload; by default nothing does.
    """

    def __init__(
        self,
        runner: Runner,
        config: ModelConfig,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        pool: PagePool,
        limits: Limits,
        model_name: str,
        max_model_len: int,
        dense_below: int,
        prefill_dense_below: int = 0,
        prefix_cache: bool = True,
        brownout: Brownout | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.model_name = model_name
        self.max_model_len = max_model_len
        self._runner = runner
        self._scheduler = Scheduler(pool, limits, PrefixCache(pool) if prefix_cache else None)
        self._limits = limits
        self._dense_below = dense_below
        self._prefill_dense_below = prefill_dense_below
        self._brownout = brownout or Brownout()
        self._inbox: queue.SimpleQueue[tuple[Request, int] | _Abort | None] = queue.SimpleQueue()
        self._counts = Counts()
        self._prefill_seconds = 0.0
        self._lock = threading.Lock()  # nothing goes into the inbox once the stop flag is set
        self._preemptions = 0  # those that the metrics know of
        self._answers = Answers(
            runner, self._scheduler, config, tokenizer, metrics, self._brownout, max_model_len
        )
        self._beat = time.monotonic()
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._loop, name="saccade-engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the step loop."""
        self._thread.start()

    def stop(self) -> None:
        """End the step loop; unfinished requests end with finish_reason "abort"."""
        with self._lock:
            self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self,
        prompt: Seq[int],
        sampling: SamplingParams,
        sparsity: SparsityParams,
        *,
        n: int = 1,
        priority: int = 0,
        request_id: str,
        cache_salt: str = "",
    ) -> Stream:
        """Queue a request; call it in the event loop that will read the stream.

        Requests of a lower `priority` go first, whenever they came. They share the prefix cache's
        pages where they have the same `cache_salt`.

        Raises:
            RequestError: the prompt or a parameter does not fit this model.
            OverloadedError: the queue is full; try again later.
            EngineDeadError: the step loop has stopped.
        """
        check_request(
            prompt,
            sampling,
            sparsity,
            vocab=self.config.vocab_size,
            max_model_len=self.max_model_len,
        )
        check_explain(sparsity.explain, self.config.layers, self.config.heads)
        self.check_room(n)
        stream = Stream(n, lambda: self.abort(request_id))
        request = Request(
            request_id,
            tuple(prompt),
            sampling,
            sparsity,
            self._dense_below,
            stream,
            time.monotonic(),
            prefill_dense_below=self._prefill_dense_below,
            own_pattern=self.config.patterns is not None,
            priority=priority,
            cache_salt=cache_salt,
        )
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise EngineDeadError(
                    "the engine has stopped: " + (self._failure or "shutting down")
                )
            self._counts.arrive(n, len(prompt))
            self._inbox.put((request, n))
        return stream

    def check_room(self, choices: int) -> None:
        """Whether so many more choices may come; for a request that submits several prompts.

        Raises:
            RequestError: more than ever run and wait together.
            OverloadedError: more than may come now; try again later.
        """
        most = self._limits.max_queue + self._limits.max_seqs
        if choices > most:
            raise RequestError(
                f"n: {choices} choices over all prompts are more than the {most} that this service "
                "runs and queues at once; send fewer prompts a request",
                param="n",
            )
        self._counts.check_room(choices, most)

    def abort(self, request_id: str) -> None:
        """Stop a request; its unfinished choices end with finish_reason "abort"."""
        self._inbox.put(_Abort(request_id))

    def prefilled(self, request_id: str) -> int:
        """Prompt tokens of a running request whose keys are cached, for a progress bar."""
        request = self._answers.requests.get(request_id)
        if request is None or not request.sequences:
            return 0
        return min(request.sequences[0].computed, len(request.prompt))

    def load(self) -> Load:
        """What there is to do, after the last step and with what has arrived since."""
        return self._counts.load

    def health(self) -> Health:
        """Whether the step loop advances."""
        age = time.monotonic() - self._beat
        alive = self._thread.is_alive() and age < STALE_BEAT and self._failure is None
        reason = self._runner.degraded
        if not alive:
            reason = self._failure or f"no step for {age:.0f} seconds"
        return Health(alive, age, self._runner.degraded is not None, reason)

    # -- the engine's thread ----------------------------------------------------------------

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._beat = time.monotonic()
                    self._receive()
                    work = self._scheduler.schedule()
                    if work:
                        self._step(work)
                    self._flush()
        except Exception as error:  # noqa: BLE001  the loop must not die in silence
            _log.exception("the step loop failed")
            told = str(error) if isinstance(error, EngineDeadError) else type(error).__name__
            self._failure = f"the step loop failed: {told}"
        finally:
            self._close()

    def _receive(self) -> None:
        """Take in what has arrived; wait for something when there is nothing to do."""
        idle = not self._scheduler.running and not self._scheduler.waiting
        try:
            message = self._inbox.get(timeout=IDLE_BEAT) if idle else self._inbox.get_nowait()
            while True:
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, message: tuple[Request, int] | _Abort | None) -> None:
        if isinstance(message, _Abort):
            request = self._answers.requests.get(message.request_id)
            if request is not None:
                self._answers.end(request, Ending("abort"))
        elif message is not None:
            request, choices = message
            self._counts.take(choices, len(request.prompt))
            self._scheduler.add(request, choices)
            self._answers.begin(request)

    def _step(self, work: list[Work]) -> None:
        now = time.monotonic()
        prompts = any(item.sequence.unfilled for item in work)
        for item in work:
            if item.sequence.started is None:
                self._start(item.sequence, now)
            item.sequence.cut = self._brownout.cut(item.sequence)
        looked: list[Looked] = []
        prefilled: list[Prefilled] = []
        for outcome in self._runner.run(work):
            sequence = outcome.work.sequence
            if sequence.state is not State.RUNNING:
                continue
            try:
                self._answers.advance(outcome, looked, prefilled)
            except Exception as error:  # noqa: BLE001  one request's trouble stays its own
                self._runner.check_device(error)
                _log.error("request %s failed", sequence.request.id, exc_info=error)
                self._answers.finish(
                    sequence, "", Ending("error"), error="sampling failed on this request"
                )
        if looked:
            observe(self.metrics, looked)
        for chunk in prefilled:
            self.metrics.prefilled(chunk.mean_density, chunk.mean_coverage)
        if prompts:
            self._prefill_seconds += time.monotonic() - now

    def _start(self, sequence: Sequence, now: float) -> None:
        request, sequence.started = sequence.request, now
        if request.cached is not None:
            self.metrics.prefix_cache(len(request.prompt), request.cached)

    def _flush(self) -> None:
        """Send the step's deltas; metrics are booked before, so a caller who asks sees its own."""
        self._brownout.observe(time.monotonic(), longest_wait(self._scheduler.waiting))
        self.metrics.brownout(self._brownout.level)
        self._report_load()
        self._answers.send()

    def _report_load(self) -> None:
        scheduler = self._scheduler
        self._counts.update(self._answers.requests.values(), scheduler, self._prefill_seconds)
        self.metrics.queued(self._counts.load.queued_tokens)
        self.metrics.preempted(scheduler.preemptions - self._preemptions)
        self._preemptions = scheduler.preemptions
        self.metrics.set_load(len(scheduler.running), self._counts.waiting, scheduler.pool.usage)

    def _close(self) -> None:
        """End everything that is still open, so that nobody waits for ever."""
        with self._lock:
            self._stopping = True
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                break
        ending = Ending("error" if self._failure else "abort")
        try:
            for request in list(self._answers.requests.values()):
                self._answers.end(request, ending, self._failure)
            self._flush()
        except Exception:  # noqa: BLE001  what made the loop fail may well fail again
            _log.exception("the end of the step loop failed")
            self._answers.abandon(self._failure or "the engine failed while it stopped")
