"""An encoder with its head, for inference only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kernels.attention import Impl
from models.encoders.defaults import question_length
from models.encoders.heads import NAMES, make_head
from models.encoders.layers import Embeddings, EncoderLayer, looks
from models.encoders.texts import Packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from models.encoders.config import EncoderConfig
    from models.encoders.texts import Text

BODY = {"longformer": "longformer.", "bigbird": "bert."}
"""What Hugging Face's names put in front of an encoder's own parameters under a head."""
REMOVED = 1e6
"""What transformers takes off the scores of a question's tokens."""


class Encoder(nn.Module):
    """Longformer or BigBird over lists of pages, and what stands on it.

    Parameters are allocated and not filled; `models.encoders.loader.load` fills them.

    Args:
        config: shape of the model.
        dtype: of parameters and activations.
        device: where it runs; "meta" gives names and shapes without memory.
    """

    def __init__(
        self, config: EncoderConfig, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.config = config
        self.impl = Impl.TORCH
        if device != "meta":
            self.impl = Impl.of(torch.device(device), dtype, config.head_dim, 1)
        if self.impl is Impl.NUMBA:
            self.impl = Impl.TORCH  # which is what a CPU's tiles are computed with
        with torch.device("meta"):
            self.embeddings = Embeddings(config)
            self.layer = nn.ModuleList(
                EncoderLayer(config, layer, self.impl) for layer in range(config.layers)
            )
            self.head = make_head(config)
        self.to(dtype)
        self.requires_grad_(False)
        if device != "meta":
            self.to_empty(device=device)

    def stored_name(self, name: str) -> str:
        """How a checkpoint calls a parameter."""
        config = self.config
        if name.startswith("head."):
            name = name.removeprefix("head.")
            names = NAMES[config.family, config.head]
            start = next(start for start in names if name.startswith(start))
            return names[start] + name.removeprefix(start)
        body = "" if config.head == "model" else BODY[config.family]
        return body + (f"encoder.{name}" if name.startswith("layer.") else name)

    def hidden(self, packed: Packed) -> Tensor:
        """Run the layers over some texts.

        Returns:
            [tokens, hidden_size], of all texts one behind the other.
        """
        hidden: Tensor = self.embeddings(packed)
        where = looks(self.config, packed, hidden.dtype)
        for layer in self.layer:
            hidden = layer(hidden, where)
        return hidden

    def forward(self, texts: Sequence[Text]) -> list[Tensor]:
        """What the head says of each text.

        Returns:
            In float32, or float64 for a model in float64: [tokens, hidden_size] without a head,
            [tokens, vocab_size] to fill masked tokens, [labels] to classify, and [tokens, 2] for
            the first and the last token of an answer.
        """
        packed = Packed.of(texts, self.embeddings.word_embeddings.weight.device)
        hidden = self.hidden(packed)
        parts = packed.slices()
        if self.config.head == "classification":
            return list(self.labels(torch.stack([hidden[part.start] for part in parts])))
        scores = {"masked_lm": self.tokens, "question_answering": self.spans}
        if self.config.head == "model":
            return [_wide(hidden[part]) for part in parts]
        find = scores[self.config.head]
        found = [find(hidden[part]) for part in parts]
        if self.config.head == "question_answering":
            found = [self.asked(one, text) for one, text in zip(found, texts, strict=True)]
        return found

    def tokens(self, hidden: Tensor) -> Tensor:
        """Scores of every token for some places: [rows, vocab_size]."""
        assert self.head is not None
        return _wide(self.head(hidden, self.embeddings.word_embeddings.weight))

    def labels(self, first: Tensor) -> Tensor:
        """Scores of the labels of texts by their first tokens: [texts, labels]."""
        assert self.head is not None
        return _wide(self.head(first))

    def spans(self, hidden: Tensor) -> Tensor:
        """Scores of one text's tokens as the first and the last of an answer: [tokens, 2]."""
        assert self.head is not None
        return _wide(self.head(hidden))

    def asked(self, scores: Tensor, text: Text) -> Tensor:
        """Those scores without the question's tokens, but for the first, as BigBird's code does."""
        if self.config.family == "bigbird":
            scores = scores.clone()
            scores[1 : question_length(self.config, text.ids)] -= REMOVED
        return scores


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
