"""From logits to the next token of one sequence."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from service.engine.types import SamplingParams


GREEDY_BELOW = 1e-5
"""Temperatures under it mean greedy: the quotient would leave float32's range."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A token's log-probability (natural log) and the best rivals', best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence; keeps its random stream and its penalties' counts.

    The stream belongs to the sequence, so a seeded answer does not depend on the batch.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: tuple[int, ...],
        index: int,
        vocab: int,
        ends: frozenset[int],
    ) -> None:
        self._params = params
        self._generator = torch.Generator()
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._generator.manual_seed((seed + index) % 2**63)
        # Tokens that would end the sequence, barred before `min_tokens`.
        self._ends = torch.tensor(sorted({*ends, *params.stop_token_ids}), dtype=torch.int64)
        self._bias_ids = torch.tensor([i for i, _ in params.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in params.logit_bias])
        self._counts = torch.zeros(vocab)  # times each token was generated
        self._seen = torch.zeros(vocab, dtype=torch.bool)  # in the prompt or generated
        self._seen[torch.tensor(prompt)] = True

    def sample(self, logits: Tensor, generated: int) -> int:
        """The next token.

        Args:
            logits: [vocab], on any device.
            generated: tokens generated before this one.
        """
        params = self._params
        scores = self._adjusted(logits.detach().cpu().clone(), generated)
        if params.temperature < GREEDY_BELOW:
            token = int(scores.argmax())
        else:
            weights = _nucleus(scores / params.temperature, params)
            token = int(torch.multinomial(weights, 1, generator=self._generator))
        self._counts[token] += 1
        self._seen[token] = True
        return token

    def _adjusted(self, scores: Tensor, generated: int) -> Tensor:
        params = self._params
        if self._bias_ids.numel():
            scores[self._bias_ids] += self._bias.to(scores.dtype)
        if generated < params.min_tokens:
            scores[self._ends] = -torch.inf
        if params.repetition_penalty != 1.0:
            # Keskar et al. 2019, CTRL: divide where positive, multiply where negative.
            penalty = params.repetition_penalty
            repeated = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen, repeated, scores)
        if params.frequency_penalty:
            scores = scores - params.frequency_penalty * self._counts
        if params.presence_penalty:
            scores = scores - params.presence_penalty * (self._counts > 0)
        return scores


def _nucleus(scores: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [vocab] after min_p, top_k and top_p, not renormalised."""
    weights = scores.softmax(-1)
    if params.min_p > 0:
        weights = torch.where(weights >= params.min_p * weights.max(), weights, 0.0)
    if params.top_k or params.top_p < 1:
        ranked, order = weights.sort(descending=True, stable=True)
        if params.top_k:
            ranked[params.top_k :] = 0
        if params.top_p < 1:
            ranked /= ranked.sum()
            # A token stays while the mass before it is below top_p, so one always stays.
            ranked[ranked.cumsum(-1) - ranked >= params.top_p] = 0
        weights = torch.zeros_like(weights).scatter_(0, order, ranked)
    return weights


def rank(logits: Tensor, tokens: Tensor, best: int) -> list[Ranked]:
    """Log-probabilities of `tokens` under the model itself, before penalties and temperature.

    Args:
        logits: [rows, vocab].
        tokens: int64 [rows], the token each row is asked about.
        best: how many rivals to list.
    """
    logprobs = logits.log_softmax(-1)  # [rows, vocab]
    asked = logprobs.gather(-1, tokens.to(logprobs.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(best, logprobs.shape[-1]), dim=-1)
    return [
        Ranked(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(
            tokens.tolist(), asked, ids.tolist(), values.tolist(), strict=True
        )
    ]


def rank_in_slices(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, best: int, rows: int = 256
) -> list[Ranked]:
    """`rank` for many rows at once, `rows` at a time: a long prompt's logits never all exist.

    Args:
        logits: gives the logits [rows, vocab] of hidden states [rows, hidden].
        hidden: [rows, hidden].
        tokens: int64 [rows].
        best: how many rivals to list.
        rows: rows a slice.
    """
    ranked: list[Ranked] = []
    for start in range(0, tokens.shape[0], rows):
        part = slice(start, start + rows)
        ranked += rank(logits(hidden[part]), tokens[part], best)
    return ranked
