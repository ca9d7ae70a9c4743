"""Documents, each read once, and many questions about them under many policies."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from kernels.cache import LayerCache
from service.engine.holds import PROMPT_HOLD, decide
from service.engine.runner import Runner
from service.engine.scheduler import Work
from service.engine.sequence import TAIL, Request, Sequence
from service.engine.tally import Tally
from service.engine.types import SamplingParams
from service.errors import GenerationError
from service.eval.script import Script
from service.eval.seating import Document, Front, groups, seatings, shared_pages
from service.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray
    from torch import Tensor

    from models.config import ModelConfig
    from models.decoder import Decoder
    from models.tokenizer import Tokenizer
    from service.engine.outcome import Outcome
    from service.engine.types import SparsityParams, SparsityReport
    from service.eval.paper import Dictation, Exam
    from service.eval.room import Room
    from service.eval.script import Audit
    from service.eval.seating import Seat

AUDIT_EVERY = 4
"""Of so many steps under a policy one is audited: often, since errors are what is asked for."""
FORCED = 128
"""Tokens of a step that predicts a given text."""


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


class Session:
    """A model with room for some documents and their questions at a time.

    Every document is prefilled once, for all policies that do so alike, and its questions are
    forked behind it. The last 128 tokens of every prompt, where the question is, and the answer
    attend under the policy, exactly as they do in the engine. All prompts that have room together
    run together, policy by policy.

    A policy's steps are counted from the prompts' tails on, where all of them start together: which
    of a prompt's tokens are audited does not depend on its companions.
    """

    def __init__(
        self, decoder: Decoder, config: ModelConfig, tokenizer: Tokenizer, room: Room
    ) -> None:
        weight = decoder.model.embed_tokens.weight
        caches = [
            LayerCache.allocate(
                room.pages, config.kv_heads, config.head_dim, weight.dtype, weight.device
            )
            for _ in range(config.layers)
        ]
        self._runner = Runner(decoder, caches, config.heads, config.windows, Metrics("eval"))
        self._layers, self._heads = config.layers, config.heads
        self._ends = frozenset(config.eos_ids)
        self._tokenizer = tokenizer
        self._room = room

    @torch.inference_mode()
    def answers(self, exams: Seq[Exam], policies: Seq[SparsityParams]) -> list[list[list[Answer]]]:
        """Answers to the questions of every exam: greedy, or sampled from its seeds.

        Returns:
            Of each policy, of each exam, an answer to each question.

        Raises:
            GenerationError: the model failed on one of them, or there is no room for it.
        """
        found: list[list[Answer]] = [[] for _ in policies]
        for alike in prefilled_alike(policies):
            given = chain.from_iterable(exam.seeds or [None] * len(exam.tails) for exam in exams)
            documents = [Document.of_exam(exam) for exam in exams]
            for seats in self._seated(documents, policies[alike[0]]):
                seeds = list(islice(given, len(seats)))
                for number in alike:
                    scripts = [_script(seat, policies[number]) for seat in seats]
                    found[number] += self._answered(scripts, seeds)
        return [
            [list(islice(rest, len(exam.tails))) for exam in exams] for rest in map(iter, found)
        ]

    @torch.inference_mode()
    def forced(
        self, dictations: Seq[Dictation], policies: Seq[SparsityParams]
    ) -> list[list[Forced]]:
        """What it costs to predict the last tokens of given texts, each from all before it.

        The tokens that make these predictions attend under the policy, and so does the text before
        them where the policy says so.

        Returns:
            Of each policy, of each dictation.

        Raises:
            GenerationError: the model failed on one of them, or there is no room for it.
        """
        found: list[list[Forced]] = [[] for _ in policies]
        for alike in prefilled_alike(policies):
            given = iter(dictations)
            documents = [Document.of_dictation(dictation) for dictation in dictations]
            for seats in self._seated(documents, policies[alike[0]]):
                texts = [dictation.tokens.tolist() for dictation in islice(given, len(seats))]
                for number in alike:
                    scripts = [
                        _script(seat, policies[number], text[:-1])
                        for seat, text in zip(seats, texts, strict=True)
                    ]
                    found[number] += self._predicted(scripts, texts)
        return found

    def _seated(self, documents: Seq[Document], sparsity: SparsityParams) -> Iterator[list[Seat]]:
        """Prompts that have room together, computed up to their tails."""
        for group in groups(documents, self._room):
            fronts = []
            for document, pages in zip(group, shared_pages(group), strict=True):
                # As the front of a longer prompt, whose tail is yet to come, and behind all that
                # falls back with it.
                prompt = (*document.prompts[0][: document.shared], *[0] * (PROMPT_HOLD + TAIL))
                sequence = Sequence(_request(prompt, sparsity, 1), 0, list(prompt), pages=pages)
                fronts.append(Work(sequence, 0, document.shared))
            done = self._prefill(fronts, [Tally() for _ in fronts])
            for seats in seatings(group, self._room, done):
                # What does not fill a page is every prompt's own, and the same for all policies.
                scripts = [_script(seat, sparsity) for seat in seats]
                rest = self._prefill(
                    [
                        Work(one, seat.shared, one.request.tail_start - seat.shared)
                        for seat, one in zip(seats, (x.sequence for x in scripts), strict=True)
                    ],
                    [deepcopy(one.prefilled) for one in scripts],
                )
                yield [replace(seat, front=front) for seat, front in zip(seats, rest, strict=True)]

    def _prefill(self, work: Seq[Work], tallies: Seq[Tally]) -> list[Front]:
        """Compute the work; each tally counts what its tokens did, too."""
        counts = {item.sequence: tally for item, tally in zip(work, tallies, strict=True)}
        for step in steps(work, self._room.step):
            for outcome in self._runner.run(step):
                _book(outcome, counts[outcome.work.sequence])
        return [Front(counts[item.sequence], item.sequence.fallbacks) for item in work]

    def _answered(self, scripts: list[Script], seeds: list[int | None]) -> list[Answer]:
        rngs = [None if seed is None else np.random.default_rng(seed) for seed in seeds]
        running, number = list(zip(scripts, rngs, strict=True)), 0
        while running:
            ends = self._stepped([(one, _rest(one)) for one, _ in running], number)
            last = torch.stack([hidden[-1] for hidden in ends])  # [sequences, hidden]
            tokens = chosen(self._runner.logits(last), [rng for _, rng in running])
            for (one, _), token in zip(running, tokens, strict=True):
                one.sequence.tokens.append(token)
            running = [pair for pair in running if not self._done(pair[0].sequence)]
            number += 1
        return [
            Answer(
                self._tokenizer.decode(one.sequence.tokens[one.sequence.prompt_len :]),
                one.report(),
                one.audit(self._layers, self._heads),
            )
            for one in scripts
        ]

    def _predicted(self, scripts: list[Script], texts: list[list[int]]) -> list[Forced]:
        nats: list[list[Tensor]] = [[] for _ in scripts]
        running, number = list(zip(scripts, texts, nats, strict=True)), 0
        while running:
            work = [(script, min(FORCED, _rest(script))) for script, _, _ in running]
            for hidden, (script, text, costs) in zip(
                self._stepped(work, number), running, strict=True
            ):
                stop = script.sequence.computed + 1
                wanted = torch.tensor(text[stop - len(hidden) : stop], device=hidden.device)
                logits = self._runner.logits(hidden)  # [count, vocab]
                costs.append(F.cross_entropy(logits, wanted, reduction="none"))
            running = [one for one in running if _rest(one[0])]
            number += 1
        return [
            Forced(
                torch.cat(costs).double().cpu().numpy(),
                one.report(),
                one.audit(self._layers, self._heads),
            )
            for one, costs in zip(scripts, nats, strict=True)
        ]

    def _stepped(self, work: list[tuple[Script, int]], number: int) -> list[Tensor]:
        """The policy's step `number`, so many tokens of each script: hidden states [count, hidden].

        What is too much to run at once is still one step.
        """
        hidden: list[Tensor] = []
        audit = number % AUDIT_EVERY == 0
        scripts = iter([script for script, _ in work])
        every = [Work(one.sequence, one.sequence.computed, count) for one, count in work]
        for step in steps(every, self._room.step):
            outcomes = self._runner.run(step, audit=audit)
            hidden += [next(scripts).book(outcome) for outcome in outcomes]
        return hidden

    def _done(self, sequence: Sequence) -> bool:
        most = sequence.request.sampling.max_tokens
        return sequence.tokens[-1] in self._ends or sequence.generated >= most


def prefilled_alike(policies: Seq[SparsityParams]) -> list[list[int]]:
    """Numbers of the policies, those together under which a prompt is prefilled alike."""
    groups: dict[object, list[int]] = {}
    for number, one in enumerate(policies):
        way = {
            "dense": (),
            "dynamic": (one.prefill_coverage, one.dense_layers, one.min_coverage),
            "fixed": (one.pattern, one.dense_layers),
        }[one.prefill]
        groups.setdefault((one.prefill, *way), []).append(number)
    return list(groups.values())


def chosen(logits: Tensor, rngs: Seq[np.random.Generator | None]) -> list[int]:
    """The next token of each sequence: the likeliest, or sampled where it has a generator.

    Args:
        logits: [sequences, vocab].
        rngs: of each sequence; one number is drawn from each.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    rows = [row for row, rng in enumerate(rngs) if rng is not None]
    if rows:
        numbers = [[rng.random()] for rng in rngs if rng is not None]
        sums = logits[rows].double().softmax(-1).cumsum(-1)  # [sampled, vocab]
        whole = sums[:, -1:]  # 1 but for rounding; a product that reached it would draw nothing
        wanted = (whole * whole.new_tensor(numbers)).minimum(whole.nextafter(0 * whole))
        drawn = torch.searchsorted(sums, wanted, right=True)[:, 0].tolist()
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def steps(work: Iterable[Work], most: int) -> Iterator[list[Work]]:
    """Work, in order, as steps of at most `most` tokens; only what is longer is cut."""
    step: list[Work] = []
    free = most
    for item in work:
        for start in range(item.start, item.stop, most):
            piece = Work(item.sequence, start, min(most, item.stop - start))
            if piece.count > free:
                yield step
                step, free = [], most
            step.append(piece)
            free -= piece.count
    if step:
        yield step


def _book(outcome: Outcome, tally: Tally) -> None:
    """Count what became of a part of a prompt before its tail."""
    if outcome.error is not None:
        raise GenerationError(outcome.error)
    if outcome.prefilled is not None:
        tally.add_prefill(outcome.prefilled)
    decide(outcome.work, lambda reason, _, tokens: tally.fell_back(reason, tokens))


def _rest(script: Script) -> int:
    """Tokens that are not computed yet."""
    return len(script.sequence.tokens) - script.sequence.computed


def _script(seat: Seat, sparsity: SparsityParams, tokens: list[int] | None = None) -> Script:
    """A seat's sequence at the start of its tail; `tokens` where more is known than the prompt."""
    request = _request(seat.prompt, sparsity, seat.behind)
    known = list(seat.prompt) if tokens is None else list(tokens)
    tail, front = request.tail_start, seat.front
    fallbacks = {page: why for page, why in front.fallbacks.items() if page < tail}
    sequence = Sequence(request, 0, known, pages=seat.pages, computed=tail, fallbacks=fallbacks)
    return Script(sequence, front.prefilled)


def _request(prompt: tuple[int, ...], sparsity: SparsityParams, max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    # Short contexts too run under the policy: its cost is what is asked for.
    return Request("eval", prompt, sampling, sparsity, 0, None, 0.0)
