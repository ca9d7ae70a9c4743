"""Background processes that build batches, and the thread that moves them to the device.

Only the consumer's side needs torch; the workers import it nowhere, so that they start at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.training.corpus import Corpus
from models.training.errors import TrainingError
from models.training.examples import ExampleBuilder
from models.training.parent import end_with_parent
from models.training.pieces import TEXT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from models.training.mix import Mix

_STOP = None


@dataclass(frozen=True, slots=True)
class Request:
    """What one batch shall be."""

    index: int  # of the batch; its random numbers depend on the run's seed and this alone
    rows: int
    length: int
    text_loss: float  # share of the sequences whose running text carries loss


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as arrays of the host."""

    request: Request
    tokens: npt.NDArray[np.uint16]  # [rows, length + 1]
    kinds: npt.NDArray[np.uint8]  # [rows, length + 1]
    text_tokens: int  # tokens with the loss of running text
    text_share: float  # share of sequences that had it


def build_batch(builder: ExampleBuilder, request: Request, seed: int) -> Batch:
    """Draws a batch's sequences."""
    rng = np.random.default_rng([seed, request.index])
    chosen = rng.random(request.rows) < request.text_loss
    examples = [
        builder.draw(rng, request.length + 1, text_loss=bool(text_loss)) for text_loss in chosen
    ]
    kinds = np.stack([example.kinds for example in examples])
    return Batch(
        request=request,
        tokens=np.stack([example.tokens for example in examples]),
        kinds=kinds,
        text_tokens=int((kinds[chosen] == TEXT).sum()),
        text_share=float(chosen.mean()),
    )


def _work(folder: str, seed: int, mix: Mix, requests: Any, results: Any) -> None:
    """A worker process: builds what is asked for until told to stop."""
    from pathlib import Path

    from tokenizers import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    try:
        root = Path(folder)
        builder = ExampleBuilder(
            Tokenizer.from_file(str(root / "tokenizer.json")),
            Corpus.load(root / "text"),
            Corpus.load(root / "generated"),
            text_words=json.loads((root / "words.json").read_text(encoding="utf-8")),
            mix=mix,
        )
        while (request := requests.get()) is not _STOP:
            results.put(build_batch(builder, request, seed))
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        results.put(traceback.format_exc())


class Loader:
    """Hands out batches in the order in which they were asked for.

    `move` turns a batch into what the consumer wants (tensors on the device); it runs in a thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        seed: int,
        mix: Mix,
        move: Callable[[Batch], Any],
    ) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # inherited; one thread a worker
        context = multiprocessing.get_context("spawn")
        self._requests = context.Queue()
        self._results = context.Queue()
        self._move = move
        self._ready: queue.Queue[Any] = queue.Queue()
        self._order: queue.Queue[int] = queue.Queue()
        self._workers = [
            context.Process(
                target=_work,
                args=(str(folder), seed, mix, self._requests, self._results),
                daemon=True,
            )
            for _ in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        os.environ.pop("TOKENIZERS_PARALLELISM")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()
        self.outstanding = 0  # batches asked for and not yet taken

    def submit(self, request: Request) -> None:
        """Asks for a batch."""
        self._order.put(request.index)
        self._requests.put(request)
        self.outstanding += 1

    def take(self) -> Any:
        """The next batch, moved; waits for it.

        Raises:
            TrainingError: a worker failed; the message holds its traceback.
        """
        while True:
            try:
                item = self._ready.get(timeout=5.0)
                break
            except queue.Empty:
                dead = [w.exitcode for w in self._workers if not w.is_alive()]
                if dead:
                    raise TrainingError(
                        f"A data worker ended with exit code {dead[0]}: see its output above."
                    ) from None
        if isinstance(item, str):
            raise TrainingError(f"A data worker failed; its traceback follows.\n{item}")
        self.outstanding -= 1
        return item

    def close(self) -> None:
        """Ends the workers; batches not taken are dropped."""
        # The thread first: a worker that ends in the middle of a message would leave it waiting.
        self._stopping.set()
        self._thread.join(timeout=10.0)
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join(timeout=10.0)
        for channel in (self._requests, self._results):
            channel.cancel_join_thread()
            channel.close()

    def _pump(self) -> None:
        waiting: dict[int, Batch] = {}
        expected: int | None = None
        while not self._stopping.is_set():
            try:
                item = self._results.get(timeout=0.5)
            except queue.Empty:
                continue
            except (OSError, EOFError):
                return
            if isinstance(item, str):
                self._ready.put(item)
                return
            waiting[item.request.index] = item
            if expected is None:
                expected = self._order.get()
            while expected is not None and expected in waiting:
                batch = waiting.pop(expected)
                try:
                    self._ready.put(self._move(batch))
                except RuntimeError:
                    self._ready.put(traceback.format_exc())
                    return
                expected = None if self._order.empty() else self._order.get()
