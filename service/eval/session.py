"""One document, read once, and many questions about it under many policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from kernels.cache import LayerCache
from kernels.page import PAGE
from service.engine.runner import Runner, decide
from service.engine.scheduler import Work
from service.engine.sequence import TAIL, Mode, Request, Sequence
from service.engine.tally import Tally
from service.engine.types import SamplingParams, SparsityReport
from service.errors import GenerationError
from service.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from models.config import ModelConfig
    from models.decoder import Decoder
    from models.tokenizer import Tokenizer
    from service.engine.runner import Outcome
    from service.engine.types import SparsityParams

CHUNK = 2048
"""Tokens of a prefill step."""
OWN = 2048
"""Most tokens of a question and its answer, with what stands before it in an unfinished page."""
AUDIT_EVERY = 4
"""Of so many sparse steps one is audited: often, since errors are what is asked for."""
FORCED = 128
"""Tokens of a step that predicts a given text."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Exact and estimated coverage of the audited tokens that attended sparsely."""

    exact: NDArray[np.float64]  # [layers, audited, heads]
    estimated: NDArray[np.float64]  # [layers, audited, heads]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what its attention did."""

    text: str
    report: SparsityReport
    audit: Audit


@dataclass(frozen=True, slots=True)
class Forced:
    """What a given text cost to predict."""

    nats: NDArray[np.float64]  # [targets]  negative log-probability of each token
    report: SparsityReport
    audit: Audit


@dataclass(slots=True)
class _Open:
    """An answer in the making."""

    sequence: Sequence
    tally: Tally = field(default_factory=Tally)
    exact: list[NDArray[np.float64]] = field(default_factory=list)
    estimated: list[NDArray[np.float64]] = field(default_factory=list)


class Session:
    """A model with room for one document and some questions at a time.

    The document is prefilled densely once; the last 128 tokens of every prompt, where the question
    is, and the answer attend under the policy, exactly as they do in the engine.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        tokens: int,
        together: int = 8,
    ) -> None:
        weight = decoder.model.embed_tokens.weight
        self._shared = -(-tokens // PAGE)
        self._own = OWN // PAGE
        pages = self._shared + together * self._own
        caches = [
            LayerCache.allocate(
                pages, config.kv_heads, config.head_dim, weight.dtype, weight.device
            )
            for _ in range(config.layers)
        ]
        self._layers, self._heads = config.layers, config.heads
        self._make_runner: Callable[[], Runner] = partial(
            Runner,
            decoder,
            caches,
            config.heads,
            config.windows,
            Metrics("eval"),
            AUDIT_EVERY,
        )
        self._runner = self._make_runner()
        self._ends = frozenset(config.eos_ids)
        self._tokenizer = tokenizer
        self._together = together
        self._read: tuple[int, ...] = ()  # tokens whose keys lie in the shared pages

    @torch.inference_mode()
    def answers(
        self, prompts: list[list[int]], sparsity: SparsityParams, max_tokens: int
    ) -> list[Answer]:
        """Greedy answers to prompts that begin with the same document.

        Raises:
            GenerationError: the model failed on one of them.
        """
        # Anew, so that which steps are audited does not depend on what ran before.
        self._runner = self._make_runner()
        self._prefill(_common(prompts), sparsity)
        done: list[Answer] = []
        for start in range(0, len(prompts), self._together):
            part = prompts[start : start + self._together]
            done += self._answer(part, sparsity, max_tokens)
        return done

    @torch.inference_mode()
    def forced(self, tokens: list[int], targets: int, sparsity: SparsityParams) -> Forced:
        """Predict a given text's last tokens, each from all before it.

        The tokens that make these predictions attend under the policy; the text before them is
        prefilled densely.

        Args:
            tokens: the text; it has more tokens than `targets`.
            targets: how many of the last tokens to predict.
            sparsity: the policy.

        Raises:
            GenerationError: the model failed on it.
        """
        if targets + PAGE > OWN:
            raise GenerationError(f"at most {OWN - PAGE} tokens can be predicted at a time")
        self._runner = self._make_runner()
        first = len(tokens) - targets - 1  # what stands there predicts the first target
        self._prefill(tokens[:first], sparsity)
        # A tail of any tokens, so that the policy begins with the position `first`.
        request = _request((*tokens[:first], *[0] * TAIL), sparsity, 1)
        one = _Open(self._sequence(request, tokens[:-1], 0))
        nats = []
        while one.sequence.computed < len(tokens) - 1:
            work = _next_work(one.sequence)
            if work.start >= first:
                work = Work(one.sequence, work.start, min(work.count, FORCED))
            [outcome] = self._runner.run([work])
            hidden = self._book(one, outcome)
            if work.start >= first:
                wanted = torch.tensor(tokens[work.start + 1 : work.stop + 1], device=hidden.device)
                loss = F.cross_entropy(self._runner.logits(hidden), wanted, reduction="none")
                nats.append(loss.double().cpu().numpy())
        return Forced(np.concatenate(nats), one.tally.report(sparsity.policy), self._audit(one))

    def _prefill(self, common: list[int], sparsity: SparsityParams) -> None:
        shared = tuple(common[: len(common) // PAGE * PAGE])
        if shared == self._read:
            return
        # As the front of a longer prompt, whose tail is yet to come.
        request = _request((*shared, *[0] * TAIL), sparsity, 1)
        sequence = Sequence(request, 0, list(request.prompt), pages=list(range(self._shared)))
        self._read = ()
        while sequence.computed < len(shared):
            count = min(CHUNK, len(shared) - sequence.computed)
            [outcome] = self._runner.run([Work(sequence, sequence.computed, count)])
            if outcome.error is not None:
                raise GenerationError(outcome.error)
            sequence.computed += count
        self._read = shared

    def _answer(
        self, prompts: list[list[int]], sparsity: SparsityParams, max_tokens: int
    ) -> list[Answer]:
        everything = []
        for number, prompt in enumerate(prompts):
            if len(prompt) - len(self._read) + max_tokens > OWN:
                raise GenerationError(
                    f"a question and its answer need more than {OWN} tokens behind the document"
                )
            request = _request(tuple(prompt), sparsity, max_tokens)
            everything.append(_Open(self._sequence(request, prompt, number)))
        running = list(everything)
        while running:
            outcomes = self._runner.run([_next_work(one.sequence) for one in running])
            pairs = zip(running, outcomes, strict=True)
            running = [one for one, outcome in pairs if self._goes_on(one, outcome, max_tokens)]
        return [self._finished(one, sparsity) for one in everything]

    def _sequence(self, request: Request, tokens: list[int], number: int) -> Sequence:
        """Behind the document, in the `number`-th place for a question."""
        first = self._shared + number * self._own
        pages = [*range(len(self._read) // PAGE), *range(first, first + self._own)]
        return Sequence(request, 0, list(tokens), pages=pages, computed=len(self._read))

    def _goes_on(self, one: _Open, outcome: Outcome, max_tokens: int) -> bool:
        """Book a step of one answer; whether it needs another."""
        sequence = one.sequence
        hidden = self._book(one, outcome)
        if not outcome.work.samples:
            return True
        token = int(self._runner.logits(hidden[-1:])[0].argmax())
        sequence.tokens.append(token)
        return token not in self._ends and sequence.generated < max_tokens

    def _book(self, one: _Open, outcome: Outcome) -> Tensor:
        """Count a step of one sequence; its hidden states, [count, hidden]."""
        if outcome.error is not None or outcome.hidden is None or outcome.looked is None:
            raise GenerationError(outcome.error or "the model failed on this prompt")
        item, sequence = outcome.work, one.sequence
        skip = decide(item, lambda reason, _: one.tally.fell_back(reason))
        if skip < item.count:
            one.tally.add(outcome.looked.cut(slice(skip, None)))
        if outcome.looked.exact is not None:
            # What fell back to dense attention has nothing to estimate.
            rows = [
                row
                for row in range(skip, item.count)
                if sequence.mode(item.start + row) is not Mode.DENSE
            ]
            one.exact.append(outcome.looked.exact[:, rows])
            one.estimated.append(outcome.looked.coverage[:, rows])
        sequence.computed = item.stop
        return outcome.hidden

    def _finished(self, one: _Open, sparsity: SparsityParams) -> Answer:
        generated = one.sequence.tokens[one.sequence.prompt_len :]
        return Answer(
            self._tokenizer.decode(generated),
            one.tally.report(sparsity.policy),
            self._audit(one),
        )

    def _audit(self, one: _Open) -> Audit:
        empty = [np.empty((self._layers, 0, self._heads))]
        return Audit(
            np.concatenate(one.exact or empty, axis=1),
            np.concatenate(one.estimated or empty, axis=1),
        )


def _common(prompts: list[list[int]]) -> list[int]:
    """What the prompts begin with together, without any tokens of their tails."""
    shortest = min(map(len, prompts)) - TAIL
    columns = zip(*prompts, strict=False)
    same = takewhile(lambda column: len(set(column)) == 1, columns)
    return [column[0] for column, _ in zip(same, range(max(0, shortest)), strict=False)]


def _next_work(sequence: Sequence) -> Work:
    before_tail = sequence.request.tail_start - sequence.computed
    left = len(sequence.tokens) - sequence.computed
    return Work(sequence, sequence.computed, min(before_tail, CHUNK) if before_tail > 0 else left)


def _request(prompt: tuple[int, ...], sparsity: SparsityParams, max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    # Short contexts too run under the policy: its cost is what is asked for.
    return Request("eval", prompt, sampling, sparsity, 0, lambda _: None, 0.0)
