"""What is put to the model, as plain arrays that cross processes cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from service.eval.free_text import Continuation
    from service.eval.tasks import Question

    Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Exam:
    """A document's questions as prompts that begin alike.

    Attributes:
        shared: [tokens] that all prompts begin with.
        tails: of each question, [tokens] behind those.
        questions: what a good answer mentions.
        answer_tokens: most tokens of an answer.
        seeds: of each answer's own generator, where answers are sampled; greedy without any.
    """

    shared: Tokens
    tails: tuple[Tokens, ...]
    questions: tuple[Question | Continuation, ...]
    answer_tokens: int
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dictation:
    """A text whose last tokens are predicted, each from all before it.

    Attributes:
        tokens: [tokens], special ones included; more than `targets`.
        targets: how many of the last tokens are predicted.
        skipped: how many of the first targets are not counted.
        size: bytes of text in the targets that are.
    """

    tokens: Tokens
    targets: int
    skipped: int = 0
    size: int = 0


Paper = Exam | Dictation
