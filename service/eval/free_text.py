"""Continuations of free text, in which no planted sentence should stand.

A model that was trained on texts with facts planted into them may have learnt to write such facts
by itself. Sampling shows how often it does; a greedy continuation would run in a circle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.training.tasks import MAJORITY, OTHER_FORMS, RULER
from service.eval.passages import place_in

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from models.training.tasks import Form
    from service.eval.source import Source


def _fixed(form: Form) -> str:
    """A pattern of the words before a needle's key, in singular or plural, without articles."""
    start, _, _ = form.needle.partition("{key}")
    words = re.sub(r"^(One of the|The) ", "", start).split()
    return r"\b" + r"\s+".join(f"{re.escape(word.removesuffix('s'))}s?" for word in words) + r"\b"


PLANTED = re.compile(
    "|".join(
        (
            *map(_fixed, (RULER, *OTHER_FORMS)),
            # Votes for something are in every paper; that they are something is not.
            _fixed(MAJORITY) + r"[^.!?:]{1,80}\b(is|are)\s*:",
            # KEY_VALUE: nothing but a key and its number.
            r"\b[^\W\d_]+-[^\W\d_]+:\s*\d{4}",
            # An assignment's five letters: headings too are in capitals, and Var is a river.
            r"(?-i:\bVAR\s+([A-Z]{5}\b|[A-Z]+\s*=))",
        )
    ),
    re.IGNORECASE,
)
"""What shows a planted sentence, whatever its key and its value."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What is wanted of a continuation: that nothing planted stands in it."""

    references: tuple[str, ...] = ("nothing planted",)

    def found(self, answer: str) -> int:
        """1 for a continuation without a planted sentence, else 0."""
        return int(PLANTED.search(answer) is None)


@dataclass(frozen=True, slots=True)
class FreeTask:
    """A kind of text to go on with.

    Attributes:
        make: the text's tokens, from a generator, a source and their number. A generator in the
            same state ends texts of all lengths at the same place.
        answer_tokens: most tokens of a continuation.
        questions: continuations of a text, if no fewer are wanted.
    """

    name: str
    make: Callable[[np.random.Generator, Source, int], tuple[int, ...]]
    answer_tokens: int
    questions: int

    def documents(self, answers: int, questions: int) -> int:
        """Texts for so many continuations, at most `questions` of each."""
        return -(-answers // min(questions, self.questions))


def begun(rng: np.random.Generator, source: Source, tokens: int) -> tuple[int, ...]:
    """The last `tokens` tokens of running text before a sentence begins: where facts are planted.

    Raises:
        ConfigError: there is not so much text.
    """
    text, _, place = place_in(rng, source, tokens)
    return tuple(text[place - tokens : place])
