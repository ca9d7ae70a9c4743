"""What becomes of sequences, token by token: deltas for their readers, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.page import PAGE
from service.engine.explained import Passages
from service.engine.holds import decide
from service.engine.measures import time_end, time_token
from service.engine.output import Ending, Output
from service.engine.sampler import Ranked, Sampler, rank, rank_in_slices
from service.engine.scheduler import Work
from service.engine.sequence import Fallback, Mode, Request, Sequence, State
from service.engine.stream import deliver
from service.engine.tally import Looked, Prefilled, Tally
from service.engine.types import Delta, TokenLogprob

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.tokenizer import Tokenizer
    from service.engine.brownout import Brownout
    from service.engine.outcome import Outcome
    from service.engine.runner import Runner
    from service.engine.scheduler import Scheduler
    from service.engine.types import SparsityReport, TokenLook
    from service.metrics import Metrics


@dataclass(slots=True)
class _Progress:
    """The engine's own state of one sequence."""

    sampler: Sampler
    output: Output
    tally: Tally = field(default_factory=Tally)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of prompt tokens 1, 2, ...
    opened: bool = False  # whether its first delta is out
    passages: Passages | None = None  # what its tokens attended to, where asked for


class Answers:
    """The requests in the engine and what of their answers there is; for the engine's thread.

    Args:
        runner: computes logits, and copies the pages of forks.
        scheduler: whose sequences they are.
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        metrics: where tokens and requests are counted.
        brownout: hears how long each token took.
        max_model_len: most tokens of a prompt and its answer.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        config: ModelConfig,
        tokenizer: Tokenizer,
        metrics: Metrics,
        brownout: Brownout,
        max_model_len: int,
    ) -> None:
        self.requests: dict[str, Request] = {}  # that have not ended, by id
        self._runner = runner
        self._scheduler = scheduler
        self._vocab = config.vocab_size
        self._ends = frozenset(config.eos_ids)
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._brownout = brownout
        self._max_model_len = max_model_len
        self._progress: dict[Sequence, _Progress] = {}
        self._outbox: dict[Request, list[Delta]] = {}

    def begin(self, request: Request) -> None:
        """Take in a request that the scheduler has."""
        self.requests[request.id] = request
        for sequence in request.sequences:
            self._progress[sequence] = _Progress(
                Sampler(request.sampling, request.prompt, sequence.index, self._vocab, self._ends),
                Output(self._tokenizer, request.sampling, request.prompt, self._ends),
                passages=Passages(len(request.prompt)) if request.sparsity.explain else None,
            )

    def end(self, request: Request, ending: Ending, error: str | None = None) -> None:
        """End what of a request has not ended."""
        for sequence in request.sequences:
            if sequence.state is not State.FINISHED:
                self.finish(sequence, "", ending, error=error)

    def abandon(self, error: str) -> None:
        """End all that has not ended, where the engine is broken: nothing else of it is used."""
        for request in self.requests.values():
            for sequence in request.sequences:
                if sequence in self._progress or sequence.state is not State.FINISHED:
                    sequence.state = State.FINISHED
                    last = Delta(sequence.index, "", (), (), "error", error=error)
                    self._outbox.setdefault(request, []).append(last)
            time_end(self._metrics, request.sequences[0], Ending("error"))
        self.requests.clear()
        self._progress.clear()
        self.send()

    def send(self) -> None:
        """Deliver what there is to read."""
        deliver(
            (request.stream, deltas)
            for request, deltas in self._outbox.items()
            if request.stream is not None
        )
        self._outbox.clear()

    def advance(self, outcome: Outcome, looked: list[Looked], prefilled: list[Prefilled]) -> None:
        """Book one outcome: its keys, its statistics, and its next token if it has one.

        What its tokens looked at for the first time is added to `looked` and `prefilled`.
        """
        item, sequence = outcome.work, outcome.work.sequence
        request, progress = sequence.request, self._progress[sequence]
        if outcome.error is not None:
            self.finish(sequence, "", Ending("error"), error=outcome.error)
            return

        def note(reason: Fallback, to: Mode, tokens: int) -> None:
            progress.tally.fell_back(reason, tokens)
            self._metrics.fallback(reason.value, to.value, tokens)

        if sequence.decided < item.start:
            _reuse(sequence, progress.tally)
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
        self._keep(outcome)
        if not item.samples:
            return
        if sequence.generated == 0 and sequence.index == 0:
            self._metrics.prompt_tokens(sequence.prompt_len)
            if request.sampling.max_tokens > 0:
                self._runner.copy_pages(self._scheduler.fork(request))
            for other in request.sequences[1:]:
                if other.state is not State.FINISHED:
                    self._progress[other].tally = progress.tally.shared()
        if request.sampling.max_tokens == 0:
            for choice in request.sequences:
                self.finish(choice, "", Ending("length"))
            return
        look = None
        if outcome.explained is not None and progress.passages is not None:
            progress.passages.add(outcome.explained)
            explain = request.sparsity.explain
            look = outcome.explained.look if explain is not None and explain.tokens else None
        self._sample(sequence, progress, self._runner.next_logits(outcome), look)

    def _keep(self, outcome: Outcome) -> None:
        """Let the prefix cache have the pages of the prompt that the work completed."""
        item, sequence, cache = outcome.work, outcome.work.sequence, self._scheduler.cache
        if cache is None or outcome.prefilled is None:
            return
        fresh = cache.fresh(sequence)
        if not fresh:
            return
        sound = self._runner.sound([sequence.pages[number] for number in fresh])
        sequence.sealed = not all(sound)
        first = fresh.start - item.start // PAGE
        stop = first + (sound.index(False) if sequence.sealed else len(sound))
        seen = outcome.prefilled
        cache.keep(
            sequence,
            zip(seen.density[first:stop].tolist(), seen.coverage[first:stop].tolist(), strict=True),
        )

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
        self._brownout.token(time_token(self._metrics, sequence))
        room = len(sequence.tokens) < self._max_model_len
        text, ending = progress.output.push(token, sequence.generated, room)
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            ranked = rank(logits[None], torch.tensor([token]), params.logprobs)
            logprobs = tuple(self._named(entry) for entry in ranked)
        self._metrics.generation_tokens(1)
        if ending is not None:
            self.finish(sequence, text, ending, (token,), logprobs, look=look)
        else:
            self._emit(sequence, text, None, (token,), logprobs, look=look)

    def _rank_prompt(self, outcome: Outcome, progress: _Progress) -> None:
        """Log-probabilities of the prompt tokens that this work's hidden states predict."""
        item, params = outcome.work, outcome.work.sequence.request.sampling
        if params.prompt_logprobs is None or item.sequence.index > 0 or outcome.hidden is None:
            return
        prompt = item.sequence.request.prompt
        # Work done again after the sequence was put back has been ranked before.
        first = max(item.start, len(progress.prompt_logprobs))
        asked = prompt[first + 1 : item.stop + 1]
        if asked:
            begin = first - item.start
            hidden = outcome.hidden[begin : begin + len(asked)]
            ranked = rank_in_slices(
                self._runner.logits, hidden, torch.tensor(asked), params.prompt_logprobs
            )
            # Named step by step: a long prompt's all at once would keep everybody waiting.
            progress.prompt_logprobs += map(self._named, ranked)

    def finish(
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
        time_end(self._metrics, sequence, ending)
        request = sequence.request
        # A choice that waits for a prompt which will never be computed ends with it.
        for other in request.sequences:
            if sequence.index == 0 and other.state is State.FORKING and ending.reason == "error":
                self.finish(other, "", ending, error=error)
        if all(choice.state is State.FINISHED for choice in request.sequences):
            self.requests.pop(request.id, None)

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
        first = not progress.opened and sequence.index == 0
        cached = (request.cached or 0) if first else 0
        prompt_logprobs = self._prompt_logprobs(request, progress) if first and not error else None
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
            cached_tokens=cached,
            look=look,
        )
        self._outbox.setdefault(request, []).append(delta)

    def _report(self, request: Request, progress: _Progress) -> SparsityReport:
        report = progress.tally.report(request.sparsity)
        if progress.passages is None:
            return report
        spans = progress.passages.spans(
            lambda start, end: self._tokenizer.decode(request.prompt[start:end], False)
        )
        return replace(report, attended=spans)

    def _prompt_logprobs(
        self, request: Request, progress: _Progress
    ) -> tuple[TokenLogprob, ...] | None:
        if request.sampling.prompt_logprobs is None:
            return None
        first = request.prompt[0]
        opening = TokenLogprob(first, self._tokenizer.token_text(first), None, ())
        return (opening, *progress.prompt_logprobs)

    def _named(self, entry: Ranked) -> TokenLogprob:
        text = self._tokenizer.token_text
        top = tuple((token, text(token), logprob) for token, logprob in entry.top)
        return TokenLogprob(entry.token, text(entry.token), entry.logprob, top)


def _reuse(sequence: Sequence, tally: Tally) -> None:
    """Count what the sequence began with as if it had computed it: it would look there, too."""
    contents = sequence.reused
    seen = Prefilled(
        np.full(len(contents), PAGE),
        np.array([one.density for one in contents]),
        np.array([one.coverage for one in contents]),
    )
    tally.add_prefill(seen.behind(sequence.decided))
    work = Work(sequence, 0, len(contents) * PAGE)
    decide(work, lambda reason, _, tokens: tally.fell_back(reason, tokens))
