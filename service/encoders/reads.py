"""What is made of a text's tokens once the encoder has run: each runs in the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from models.encoders.encoder import Encoder
    from models.encoders.texts import Text


@dataclass(frozen=True, slots=True)
class Embed:
    """A text's embedding: float32 [hidden_size].

    Attributes:
        pooling: the mean over all tokens, special ones included, or the first token.
        normalize: to length 1.
    """

    pooling: Literal["mean", "cls"]
    normalize: bool

    def __call__(self, _encoder: Encoder, _text: Text, hidden: Tensor) -> Tensor:
        """Pool."""
        vector = hidden[0] if self.pooling == "cls" else hidden.float().mean(0)
        vector = vector.float()
        return (F.normalize(vector, dim=0) if self.normalize else vector).cpu()


def classify(encoder: Encoder, _text: Text, hidden: Tensor) -> list[float]:
    """What speaks for each label.

    Probabilities: of labels that exclude each other by a softmax, of a single one, or where several
    may hold, by a sigmoid. A regression's numbers are as they are.
    """
    scores = encoder.labels(hidden[:1])[0]
    config = encoder.config
    if not config.regression:
        several = config.multi_label or len(scores) == 1
        scores = scores.sigmoid() if several else scores.softmax(-1)
    found: list[float] = scores.tolist()
    return found


@dataclass(frozen=True, slots=True)
class Filled:
    """One token for a masked place."""

    score: float  # probability
    token: int


@dataclass(frozen=True, slots=True)
class Fill:
    """The best tokens for each masked place.

    Attributes:
        places: of the masked tokens in the text.
        top_k: how many of each.
        targets: among these alone; None for all.
    """

    places: tuple[int, ...]
    top_k: int
    targets: tuple[int, ...] | None

    def __call__(self, encoder: Encoder, _text: Text, hidden: Tensor) -> list[list[Filled]]:
        """The best first, of each place."""
        where = torch.tensor(self.places, device=hidden.device)
        probabilities = encoder.tokens(hidden[where]).softmax(-1)  # [places, vocab_size]
        among = None
        if self.targets is not None:
            among = torch.tensor(self.targets, device=hidden.device)
            probabilities = probabilities[:, among]
        best = probabilities.topk(min(self.top_k, probabilities.shape[1]))
        tokens = best.indices if among is None else among[best.indices]
        return [
            [Filled(score, token) for score, token in zip(*row, strict=True)]
            for row in zip(best.values.tolist(), tokens.tolist(), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Span:
    """An answer: its first and its last token; neither for "there is no answer"."""

    score: float
    tokens: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The best answers to a question, as transformers' pipeline finds them.

    The score of a span is the product of the probabilities of its first and its last token, each a
    softmax over the context's tokens and the first one, which stands for "there is no answer".

    Attributes:
        context: which tokens an answer may hold.
        top_k: how many.
        longest: most tokens of an answer.
        none_allowed: whether there may be no answer.
    """

    context: Sequence[bool]
    top_k: int
    longest: int
    none_allowed: bool

    def __call__(self, encoder: Encoder, text: Text, hidden: Tensor) -> list[Span]:
        """The best first."""
        inside = torch.tensor(self.context)
        counted = inside.clone()
        counted[0] = True
        scores = encoder.asked(encoder.spans(hidden), text).float().cpu()
        scores = scores.masked_fill(~counted[:, None], -torch.inf).softmax(0)  # [tokens, 2]
        none = Span(float(scores[0].prod()), None)
        begins, ends = scores.masked_fill(~inside[:, None], 0).unbind(1)
        width = min(self.longest, len(ends))
        ends = F.pad(ends, (0, width - 1)).unfold(0, width, 1)  # [tokens, width]
        products = begins[:, None] * ends
        best = products.flatten().topk(min(self.top_k, products.numel()))
        found = []
        for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            begin, more = divmod(number, width)
            if score > 0:
                found.append(Span(score, (begin, begin + more)))
        if self.none_allowed:
            found = sorted([*found, none], key=lambda span: -span.score)
        return found[: self.top_k]
