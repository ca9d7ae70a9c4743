"""The engine: accepts requests from any thread and advances them all in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from service.engine.admission import check_explain, check_request
from service.engine.explained import Passages
from service.engine.holds import decide
from service.engine.measures import observe, time_end, time_token
from service.engine.output import Ending, Output
from service.engine.sampler import Ranked, Sampler, rank, rank_in_slices
from service.engine.scheduler import Limits, Scheduler, Work
from service.engine.sequence import Fallback, Mode, Request, Sequence, State
from service.engine.stream import Stream, deliver
from service.engine.tally import Looked, Prefilled, Tally
from service.engine.types import (
    Delta,
    Health,
    Load,
    SamplingParams,
    SparsityParams,
    TokenLogprob,
)
from service.errors import EngineDeadError, OverloadedError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from models.config import ModelConfig
    from models.tokenizer import Tokenizer
    from service.engine.outcome import Outcome
    from service.engine.pages import PagePool
    from service.engine.runner import Runner
    from service.engine.types import SparsityReport, TokenLook
    from service.metrics import Metrics

IDLE_BEAT = 0.5
"""Seconds between heartbeats of an idle engine."""
STALE_BEAT = 120.0
"""Seconds without a heartbeat after which the engine counts as dead: longer than any step."""

_log = logging.getLogger("saccade.engine")


@dataclass(slots=True)
class _Progress:
    """The engine's own state of one sequence."""

    sampler: Sampler
    output: Output
    tally: Tally = field(default_factory=Tally)
    prompt_ranked: list[Ranked] = field(default_factory=list)  # of prompt tokens 1, 2, ...
    opened: bool = False  # whether its first delta is out
    passages: Passages | None = None  # what its tokens attended to, where asked for


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
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.model_name = model_name
        self.max_model_len = max_model_len
        self._runner = runner
        self._scheduler = Scheduler(pool, limits)
        self._limits = limits
        self._dense_below = dense_below
        self._prefill_dense_below = prefill_dense_below
        self._ends = frozenset(config.eos_ids)
        self._inbox: queue.SimpleQueue[tuple[Request, int] | _Abort | None] = queue.SimpleQueue()
        self._arriving = 0  # sequences in the inbox
        self._waiting = 0  # sequences that the scheduler has not started
        self._running = 0  # sequences that it has
        self._arriving_tokens = 0  # prompt tokens in the inbox
        self._load = Load()  # after the last step
        self._prefill_seconds = 0.0
        self._lock = threading.Lock()  # guards the counts, the load and the stop flag
        self._preemptions = 0  # those that the metrics know of
        self._requests: dict[str, Request] = {}
        self._progress: dict[Sequence, _Progress] = {}
        self._outbox: dict[Request, list[Delta]] = {}
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
        request_id: str,
    ) -> Stream:
        """Queue a request; call it in the event loop that will read the stream.

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
        )
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise EngineDeadError(
                    "the engine has stopped: " + (self._failure or "shutting down")
                )
            self._arriving += n
            self._arriving_tokens += len(prompt)
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
        with self._lock:
            if self._arriving + self._waiting + self._running + choices > most:
                raise OverloadedError(
                    f"the queue is full ({self._waiting} waiting): try again later"
                )

    def abort(self, request_id: str) -> None:
        """Stop a request; its unfinished choices end with finish_reason "abort"."""
        self._inbox.put(_Abort(request_id))

    def prefilled(self, request_id: str) -> int:
        """Prompt tokens of a running request whose keys are cached, for a progress bar."""
        request = self._requests.get(request_id)
        if request is None or not request.sequences:
            return 0
        return min(request.sequences[0].computed, len(request.prompt))

    def load(self) -> Load:
        """What there is to do, after the last step and with what has arrived since."""
        with self._lock:
            return replace(
                self._load,
                queued_tokens=self._load.queued_tokens + self._arriving_tokens,
                queued_prompts=self._load.queued_prompts + self._arriving,
            )

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
            request = self._requests.get(message.request_id)
            for sequence in request.sequences if request else ():
                if sequence.state is not State.FINISHED:
                    self._finish(sequence, "", Ending("abort"))
        elif message is not None:
            request, choices = message
            with self._lock:
                self._arriving -= choices
                self._arriving_tokens -= len(request.prompt)
                self._waiting += choices
            self._requests[request.id] = request
            self._scheduler.add(request, choices)
            for sequence in request.sequences:
                self._progress[sequence] = _Progress(
                    Sampler(
                        request.sampling,
                        request.prompt,
                        sequence.index,
                        self.config.vocab_size,
                        self._ends,
                    ),
                    Output(self.tokenizer, request.sampling, request.prompt, self._ends),
                    passages=Passages(len(request.prompt)) if request.sparsity.explain else None,
                )

    def _step(self, work: list[Work]) -> None:
        now = time.monotonic()
        prompts = any(item.sequence.unfilled for item in work)
        for item in work:
            if item.sequence.started is None:
                item.sequence.started = now
        looked: list[Looked] = []
        prefilled: list[Prefilled] = []
        for outcome in self._runner.run(work):
            sequence = outcome.work.sequence
            if sequence.state is not State.RUNNING:
                continue
            try:
                self._advance(outcome, looked, prefilled)
            except Exception as error:  # noqa: BLE001  one request's trouble stays its own
                self._runner.check_device(error)
                _log.error("request %s failed", sequence.request.id, exc_info=error)
                self._finish(sequence, "", Ending("error"), error="sampling failed on this request")
        if looked:
            observe(self.metrics, looked)
        for chunk in prefilled:
            self.metrics.prefilled(chunk.mean_density, chunk.mean_coverage)
        if prompts:
            self._prefill_seconds += time.monotonic() - now

    def _advance(self, outcome: Outcome, looked: list[Looked], prefilled: list[Prefilled]) -> None:
        """Book one outcome: its keys, its statistics, and its next token if it has one.

        What its tokens looked at for the first time is added to `looked` and `prefilled`.
        """
        item, sequence = outcome.work, outcome.work.sequence
        request, progress = sequence.request, self._progress[sequence]
        if outcome.error is not None:
            self._finish(sequence, "", Ending("error"), error=outcome.error)
            return

        def note(reason: Fallback, to: Mode, tokens: int) -> None:
            progress.tally.fell_back(reason, tokens)
            self.metrics.fallback(reason.value, to.value, tokens)

        # A sequence that was put back computes its prompt again, which is counted once.
        if outcome.prefilled is not None:
            body = outcome.prefilled.behind(sequence.decided - item.start)
            if len(body.tokens):
                progress.tally.add_prefill(body)
                prefilled.append(body)
        skip = decide(item, note)
        if outcome.looked is not None and skip < item.count:
            fresh = outcome.looked.cut(slice(skip, None))
            progress.tally.add(fresh)
            looked.append(fresh)
        self._rank_prompt(outcome, progress)
        sequence.computed = item.stop
        if not item.samples:
            return
        if sequence.generated == 0 and sequence.index == 0:
            self.metrics.prompt_tokens(sequence.prompt_len)
            if request.sampling.max_tokens > 0:
                self._runner.copy_pages(self._scheduler.fork(request))
            for other in request.sequences[1:]:
                if other.state is not State.FINISHED:
                    self._progress[other].tally = progress.tally.shared()
        if request.sampling.max_tokens == 0:
            for choice in request.sequences:
                self._finish(choice, "", Ending("length"))
            return
        look = None
        if outcome.explained is not None and progress.passages is not None:
            progress.passages.add(outcome.explained)
            explain = request.sparsity.explain
            look = outcome.explained.look if explain is not None and explain.tokens else None
        self._sample(sequence, progress, self._runner.next_logits(outcome), look)

    def _sample(
        self,
        sequence: Sequence,
        progress: _Progress,
        logits: torch.Tensor,
        look: TokenLook | None,
    ) -> None:
        params = sequence.request.sampling
        token = progress.sampler.sample(logits, sequence.generated)
        sequence.tokens.append(token)
        time_token(self.metrics, sequence)
        room = len(sequence.tokens) < self.max_model_len
        text, ending = progress.output.push(token, sequence.generated, room)
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            ranked = rank(logits[None], torch.tensor([token]), params.logprobs)
            logprobs = tuple(self._named(entry) for entry in ranked)
        self.metrics.generation_tokens(1)
        if ending is not None:
            self._finish(sequence, text, ending, (token,), logprobs, look=look)
        else:
            self._emit(sequence, text, None, (token,), logprobs, look=look)

    def _rank_prompt(self, outcome: Outcome, progress: _Progress) -> None:
        """Log-probabilities of the prompt tokens that this work's hidden states predict."""
        item, params = outcome.work, outcome.work.sequence.request.sampling
        if params.prompt_logprobs is None or item.sequence.index > 0 or outcome.hidden is None:
            return
        prompt = item.sequence.request.prompt
        # Work done again after the sequence was put back has been ranked before.
        first = max(item.start, len(progress.prompt_ranked))
        asked = prompt[first + 1 : item.stop + 1]
        if asked:
            begin = first - item.start
            hidden = outcome.hidden[begin : begin + len(asked)]
            progress.prompt_ranked += rank_in_slices(
                self._runner.logits, hidden, torch.tensor(asked), params.prompt_logprobs
            )

    def _finish(
        self,
        sequence: Sequence,
        text: str,
        ending: Ending,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
        look: TokenLook | None = None,
    ) -> None:
        """The one way a sequence ends: its pages go back and its last delta goes out."""
        self._scheduler.finish(sequence)
        self._emit(sequence, text, ending, tokens, logprobs, error, look)
        del self._progress[sequence]
        time_end(self.metrics, sequence, ending)
        request = sequence.request
        # A choice that waits for a prompt which will never be computed ends with it.
        for other in request.sequences:
            if sequence.index == 0 and other.state is State.FORKING and ending.reason == "error":
                self._finish(other, "", ending, error=error)
        if all(choice.state is State.FINISHED for choice in request.sequences):
            self._requests.pop(request.id, None)

    def _emit(
        self,
        sequence: Sequence,
        text: str,
        ending: Ending | None,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        error: str | None = None,
        look: TokenLook | None = None,
    ) -> None:
        request, progress = sequence.request, self._progress[sequence]
        prompt_logprobs = None
        if not progress.opened and sequence.index == 0 and not error:
            prompt_logprobs = self._prompt_logprobs(request, progress)
        progress.opened = True
        delta = Delta(
            index=sequence.index,
            text=text,
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=ending.reason if ending else None,
            stop_reason=ending.matched if ending else None,
            error=error,
            sparsity=self._report(request, progress) if ending else None,
            prompt_logprobs=prompt_logprobs,
            look=look,
        )
        self._outbox.setdefault(request, []).append(delta)

    def _report(self, request: Request, progress: _Progress) -> SparsityReport:
        report = progress.tally.report(request.sparsity)
        if progress.passages is None:
            return report
        spans = progress.passages.spans(
            lambda start, end: self.tokenizer.decode(request.prompt[start:end], False)
        )
        return replace(report, attended=spans)

    def _flush(self) -> None:
        """Send the step's deltas; metrics are booked before, so a caller who asks sees its own."""
        self._report_load()
        deliver(
            (request.stream, deltas)
            for request, deltas in self._outbox.items()
            if request.stream is not None
        )
        self._outbox.clear()

    def _prompt_logprobs(
        self, request: Request, progress: _Progress
    ) -> tuple[TokenLogprob, ...] | None:
        if request.sampling.prompt_logprobs is None:
            return None
        first = request.prompt[0]
        opening = TokenLogprob(first, self.tokenizer.token_text(first), None, ())
        return (opening, *(self._named(entry) for entry in progress.prompt_ranked))

    def _named(self, entry: Ranked) -> TokenLogprob:
        text = self.tokenizer.token_text
        top = tuple((token, text(token), logprob) for token, logprob in entry.top)
        return TokenLogprob(entry.token, text(entry.token), entry.logprob, top)

    def _report_load(self) -> None:
        scheduler = self._scheduler
        forking = sum(
            sequence.state is State.FORKING
            for request in self._requests.values()
            for sequence in request.sequences
        )
        waiting = len(scheduler.waiting) + forking
        unfilled = [
            sequence.unfilled
            for request in self._requests.values()
            for sequence in request.sequences
            if sequence.unfilled
        ]
        load = Load(
            queued_tokens=sum(unfilled),
            queued_prompts=len(unfilled),
            kv_usage=scheduler.pool.usage,
            slots=len(scheduler.running) / self._limits.max_seqs,
            prefill_seconds=self._prefill_seconds,
        )
        with self._lock:
            self._load = load
            self._waiting = waiting
            self._running = len(scheduler.running)
            waiting += self._arriving
        self.metrics.queued(load.queued_tokens)
        self.metrics.preempted(scheduler.preemptions - self._preemptions)
        self._preemptions = scheduler.preemptions
        self.metrics.set_load(len(scheduler.running), waiting, scheduler.pool.usage)

    def _close(self) -> None:
        """End everything that is still open, so that nobody waits for ever."""
        with self._lock:
            self._stopping = True
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                break
        for request in list(self._requests.values()):
            for sequence in request.sequences:
                if sequence.state is not State.FINISHED:
                    ending = Ending("error" if self._failure else "abort")
                    self._finish(sequence, "", ending, error=self._failure)
        self._flush()
