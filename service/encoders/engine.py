"""The engine of an encoder: texts wait in a queue, and a thread runs them in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from models.encoders.texts import Packed
from service.engine.device import check_alive
from service.engine.types import Health, Load
from service.errors import EngineDeadError, GenerationError, OverloadedError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from models.encoders.config import EncoderConfig
    from models.encoders.encoder import Encoder
    from models.encoders.texts import Text
    from models.tokenizer import Tokenizer
    from service.metrics import Metrics

    Read = Callable[[Encoder, Text, Tensor], Any]

IDLE_BEAT = 0.5
"""Seconds between heartbeats of an idle engine."""
STALE_BEAT = 120.0
"""Seconds without a heartbeat after which the engine counts as dead: longer than any batch."""

_log = logging.getLogger("saccade.engine")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a batch and of the queue.

    Attributes:
        tokens: of a batch; a longer text runs alone.
        texts: of a batch.
        queue: texts that may wait besides.
    """

    tokens: int
    texts: int
    queue: int


@dataclass(frozen=True, slots=True)
class _Job:
    text: Text
    read: Read
    answer: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class EncoderEngine:
    """One encoder, its queue and the thread that empties it.

    Every text that `submit` takes gets exactly one result or error, in its future. Texts of a batch
    do not see each other, and where a batch fails each is tried alone: only what fails again ends
    in an error.

    Args:
        encoder: the model.
        tokenizer: its tokenizer.
        metrics: where the engine reports.
        limits: bounds of a batch and of the queue.
        model_name: the name requests use.
        max_model_len: most tokens of a text.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        limits: Limits,
        model_name: str,
        max_model_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.model_name = model_name
        self.max_model_len = max_model_len
        self._encoder = encoder
        self._device = encoder.embeddings.word_embeddings.weight.device
        self._limits = limits
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._busy_seconds = 0.0  # that went into batches
        self._change = threading.Condition()  # guards what stands above and the two below
        self._stopping = False
        self._failure: str | None = None
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="saccade-encoder", daemon=True)

    @property
    def config(self) -> EncoderConfig:
        """The encoder's configuration."""
        return self._encoder.config

    # -- any thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its batch; texts that wait end in an error."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._refuse_all()

    def submit(self, texts: Sequence[Text], reads: Sequence[Read]) -> list[Future[Any]]:
        """Queue the texts of a request, all of them or none.

        Args:
            texts: what the encoder reads.
            reads: of each text what makes its answer of what its tokens became, [tokens,
                hidden_size]; it runs in the engine's thread.

        Returns:
            A future for each text. What is cancelled before it runs is left out.

        Raises:
            RequestError: more texts than ever run and wait together.
            OverloadedError: the queue is full; try again later.
            EngineDeadError: the thread has stopped.
        """
        most = self._limits.queue + self._limits.texts
        if len(texts) > most:
            raise RequestError(
                f"{len(texts)} texts are more than the {most} that this service runs and queues at "
                "once; send fewer a request",
                param="input",
            )
        jobs = [_Job(text, read) for text, read in zip(texts, reads, strict=True)]
        with self._change:
            if self._stopping or not self._thread.is_alive():
                raise self._dead()
            waiting = len(self._waiting)
            if waiting + len(self._running) + len(jobs) > most:
                raise OverloadedError(f"the queue is full ({waiting} waiting): try again later")
            self._waiting.extend(jobs)
            self._change.notify_all()
        return [job.answer for job in jobs]

    def load(self) -> Load:
        """What there is to do; there is no KV cache, and texts in the batch run."""
        with self._change:
            jobs = len(self._waiting) + len(self._running)
            slots = len(self._running) / self._limits.texts
            return Load(self._queued_tokens(), jobs, 0.0, slots, self._busy_seconds)

    def health(self) -> Health:
        """Whether the thread advances."""
        age = time.monotonic() - self._beat
        alive = self._thread.is_alive() and self._failure is None and age < STALE_BEAT
        return Health(alive, age, reason=self._failure)

    def _queued_tokens(self) -> int:
        return sum(len(job.text.ids) for job in (*self._waiting, *self._running))

    # -- the engine's thread ----------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while batch := self._take():
                began = time.monotonic()
                self._run(batch)
                with self._change:
                    self._busy_seconds += time.monotonic() - began
                    self._running = []
                    self.metrics.set_load(0, len(self._waiting), 0.0)
                    self.metrics.queued(self._queued_tokens())
        except Exception as error:  # noqa: BLE001  whatever it is, all that wait are told
            _log.exception("the encoder's thread has stopped")
            self._failure = str(error)
        finally:
            with self._change:
                self._stopping = True
            for job in self._running:
                if not job.answer.done():
                    job.answer.set_exception(self._dead())
            self._refuse_all()

    def _take(self) -> list[_Job]:
        """The next batch, in order of arrival; empty when the engine stops."""
        with self._change:
            while True:
                self._beat = time.monotonic()
                if self._stopping:
                    return []
                batch = self._next()
                if batch:
                    self._running = batch
                    self.metrics.set_load(len(batch), len(self._waiting), 0.0)
                    self.metrics.queued(self._queued_tokens())
                    return batch
                self._change.wait(IDLE_BEAT)

    def _next(self) -> list[_Job]:
        batch: list[_Job] = []
        tokens = 0
        while self._waiting and len(batch) < self._limits.texts:
            tokens += len(self._waiting[0].text.ids)
            if batch and tokens > self._limits.tokens:
                break
            job = self._waiting.popleft()
            if job.answer.set_running_or_notify_cancel():
                batch.append(job)
            else:
                tokens -= len(job.text.ids)
        return batch

    def _run(self, batch: Sequence[_Job]) -> None:
        begin = self._beat = time.monotonic()
        try:
            with torch.inference_mode():
                packed = Packed.of([job.text for job in batch], self._device)
                hidden = self._encoder.hidden(packed)
                finite = [bool(hidden[part].isfinite().all()) for part in packed.slices()]
        except Exception as error:  # noqa: BLE001  whatever it is, others must not suffer
            self._failed(batch, error)
            return
        for job, part, good in zip(batch, packed.slices(), finite, strict=True):
            try:
                if not good:
                    raise GenerationError(
                        "the model's output is not finite for this text; serve it in float32"
                    )
                with torch.inference_mode():
                    answer = job.read(self._encoder, job.text, hidden[part])
            except Exception as error:  # noqa: BLE001  the others of the batch have answers
                self._failed([job], error)
            else:
                self._finished(job, begin, "stop")
                self.metrics.prompt_tokens(len(job.text.ids))
                job.answer.set_result(answer)

    def _failed(self, batch: Sequence[_Job], error: Exception) -> None:
        """Try each alone, and tell the one that fails alone."""
        if len(batch) > 1:
            _log.warning("a batch of %d texts failed, each is tried alone: %s", len(batch), error)
        check_alive(self._device, error)
        if len(batch) == 1:
            self._finished(batch[0], self._beat, "error")
            batch[0].answer.set_exception(error)
            return
        for job in batch:
            self._run([job])

    def _finished(self, job: _Job, begin: float, reason: str) -> None:
        now = time.monotonic()
        times = {"e2e": now - job.arrived, "queue": begin - job.arrived, "prefill": now - begin}
        self.metrics.finished(reason, **times, decode=0.0)

    def _refuse_all(self) -> None:
        with self._change:
            left, self._waiting = list(self._waiting), deque()
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(self._dead())

    def _dead(self) -> EngineDeadError:
        return EngineDeadError("the engine has stopped: " + (self._failure or "shutting down"))
