"""What stands on an encoder: fill a masked token, classify, answer a question by a span.

Modules have one shape for both families; `NAMES` says how a checkpoint calls their parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from models.encoders.layers import FeedForward, activated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from models.encoders.config import EncoderConfig

NAMES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("longformer", "masked_lm"): {
        "dense.": "lm_head.dense.",
        "norm.": "lm_head.layer_norm.",
        "bias": "lm_head.bias",
        "decoder.": "lm_head.decoder.",
    },
    ("bigbird", "masked_lm"): {
        "dense.": "cls.predictions.transform.dense.",
        "norm.": "cls.predictions.transform.LayerNorm.",
        "bias": "cls.predictions.bias",
        "decoder.": "cls.predictions.decoder.",
    },
    ("longformer", "classification"): {"": "classifier."},
    ("bigbird", "classification"): {"": "classifier."},
    ("longformer", "question_answering"): {"": ""},
    ("bigbird", "question_answering"): {"inner.": "qa_classifier.", "": "qa_classifier."},
}


def make_head(config: EncoderConfig) -> nn.Module | None:
    """The head of a configuration; None for the encoder alone."""
    if config.head == "masked_lm":
        return MaskedLmHead(config)
    if config.head == "classification":
        return ClassificationHead(config)
    return SpanHead(config) if config.head == "question_answering" else None


class MaskedLmHead(nn.Module):
    """Scores of every token for a place."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = (
            None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # Longformer's is RoBERTa's, which has GELU whatever config.json says.
        self._activation = "gelu" if config.family == "longformer" else config.activation

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """[rows, hidden_size] to [rows, vocab_size]; `embedding` is what a tied output layer is."""
        rows = self.norm(activated(self.dense(hidden), self._activation))
        return F.linear(rows, embedding if self.decoder is None else self.decoder.weight, self.bias)


class ClassificationHead(nn.Module):
    """Scores of the labels, from a text's first token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, len(config.labels))
        self._activation = None if config.family == "longformer" else config.activation

    def forward(self, first: Tensor) -> Tensor:
        """[texts, hidden_size] to [texts, labels]."""
        inner = self.dense(first)
        name = self._activation
        scores: Tensor = self.out_proj(inner.tanh() if name is None else activated(inner, name))
        return scores


class SpanHead(nn.Module):
    """Scores of each token as the first and as the last one of the answer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.inner = FeedForward(config) if config.family == "bigbird" else None
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] to [tokens, 2]."""
        scores: Tensor = self.qa_outputs(hidden if self.inner is None else self.inner(hidden))
        return scores
