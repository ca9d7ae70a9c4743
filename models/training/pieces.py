"""Token pieces of facts, questions and answers, and the sequences that they are joined into.

Text that is not from a corpus is spelled from pieces whose tokens are cached. Every piece starts
with a space or a newline, or follows a newline or a special token: the tokenizer cuts there anyway,
so the joined tokens are those of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.training.bpe import (
    ASSISTANT_ID,
    BOS_ID,
    END_ID,
    EOS_ID,
    PAD_ID,
    SYSTEM_ID,
    USER_ID,
)
from models.training.tasks import INTRODUCTION, SEVERAL, Form

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

NONE, TEXT, ANSWER = 0, 1, 2  # kinds of a token's loss


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence."""

    tokens: npt.NDArray[np.uint16]  # [length]
    kinds: npt.NDArray[np.uint8]  # [length] NONE, TEXT or ANSWER: the loss on predicting the token


@dataclass(slots=True)
class Parts:
    """A growing sequence: pieces of token ids, each of one loss kind."""

    pieces: list[Sequence[int] | npt.NDArray[np.uint16]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    size: int = 0  # tokens

    def add(self, piece: Sequence[int] | npt.NDArray[np.uint16], kind: int) -> None:
        """Appends tokens of one kind."""
        if len(piece):
            self.pieces.append(piece)
            self.kinds.append(kind)
            self.size += len(piece)

    def extend(self, other: Parts) -> None:
        """Appends another sequence."""
        self.pieces += other.pieces
        self.kinds += other.kinds
        self.size += other.size

    def finish(self, length: int) -> Example:
        """Cuts or pads to `length`."""
        tokens = np.full(length, PAD_ID, dtype=np.uint16)  # [length]
        kinds = np.zeros(length, dtype=np.uint8)  # [length]
        flat = np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in self.pieces])
        sizes = [len(piece) for piece in self.pieces]
        flat_kinds = np.repeat(np.asarray(self.kinds, dtype=np.uint8), sizes)
        used = min(length, self.size)
        tokens[:used] = flat[:used]
        kinds[:used] = flat_kinds[:used]
        return Example(tokens, kinds)


@dataclass(frozen=True, slots=True)
class Fact:
    """What a document states about one key."""

    key: str
    values: tuple[str, ...]
    form: Form


class Speller:
    """Tokens of the forms' sentences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def encode(piece: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(piece, add_special_tokens=False).ids)

        # Words repeat, so a cache spares nearly every call; bounded, as invented words do not end.
        self.encode: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=100_000)(encode)
        self._digits = [self.encode(str(digit)) for digit in range(10)]
        # Byte-level BPE writes a newline as "\u010a".
        vocab = tokenizer.get_vocab()
        self.newlines = frozenset(i for token, i in vocab.items() if set(token) == {"\u010a"})

    def number(self, value: str) -> tuple[int, ...]:
        """A number's digits, without the space before it."""
        return tuple(token for digit in value for token in self._digits[int(digit)])

    def spelled(self, value: str) -> tuple[int, ...]:
        """A value with the space before it: a number's digits one by one, or a word."""
        if value.isdigit():
            return self.encode(" ") + self.number(value)
        return self.encode(f" {value}")

    def key(self, key: str, *, space: bool = True) -> tuple[int, ...]:
        """A key, with the space before it or at the start of a text."""
        first, dash, second = key.partition("-")
        ids = self.encode(f" {first}" if space else first)
        return ids + (self.encode("-") + self.encode(second) if dash else ())

    def around(self, template: str, key: str) -> tuple[int, ...]:
        """A template's text with its key; the template must not end with a space."""
        head, found, tail = template.partition("{key}")
        if not found:
            return self.encode(template)
        ids = self.encode(head.removesuffix(" ")) if head.strip() else ()
        ids += self.key(key, space=head.endswith(" "))
        return ids + (self.encode(tail) if tail else ())

    def needle(self, form: Form, key: str, value: str, before: str) -> tuple[int, ...]:
        """The sentence that states a fact, after `before`: nothing, a space or a newline."""
        head, _, tail = form.needle.partition("{value}")
        lead = self.encode(before) if before == "\n" else ()
        head = before + head if before == " " else head
        ids = lead + self.around(head.rstrip(" "), key) + self.spelled(value)
        return ids + (self.encode(tail) if tail else ())

    def assignment(self, name: str, source: str | None, value: str) -> tuple[int, ...]:
        """` VAR NAME = value.` or ` VAR NAME = VAR SOURCE.`"""
        ids = self.encode(" VAR") + self.encode(f" {name}") + self.encode(" =")
        if source is None:
            ids += self.encode(" ") + self.number(value)
        else:
            ids += self.encode(" VAR") + self.encode(f" {source}")
        return ids + self.encode(".")

    def lead(self, *, chat: bool, after_query: bool) -> tuple[int, ...]:
        """What stands between a document or an answer and the next question or text."""
        if chat and after_query:
            newline = self.encode("\n")
            return (*newline, USER_ID, *newline)
        return self.encode("\n\n")

    def open(self, *, chat: bool, system: str = "", introduce: bool = False) -> Parts:
        """A sequence's first tokens, up to where the document starts."""
        parts = Parts()
        newline = self.encode("\n")
        parts.add((BOS_ID,), NONE)
        if chat:
            if system:
                parts.add((SYSTEM_ID, *newline, *self.encode(system), END_ID, *newline), NONE)
            parts.add((USER_ID, *newline), NONE)
        if introduce:
            parts.add((*self.encode(INTRODUCTION), *newline), NONE)
        return parts

    def fact_query(self, fact: Fact, *, chat: bool, one: bool) -> Parts:
        """A question about a fact, in the singular with `one`, and its answer."""
        form = fact.form
        question = form.question_one if one else form.question
        head, _, tail = (form.answer_one if one else form.answer).partition("{values}")
        space = "" if chat else " "
        answer = Parts()
        answer.add(self.around(space + head.rstrip(" "), fact.key), TEXT)
        for place, value in enumerate(fact.values):
            answer.add((self.encode(",") if place else ()) + self.spelled(value), ANSWER)
        answer.add(self.encode(tail), ANSWER)
        return self._ask(self.around(space + question, fact.key), answer, chat=chat)

    def several_query(self, facts: Sequence[Fact], *, chat: bool) -> Parts:
        """RULER's question about several keys, answered key by key, each with its value."""
        head, _, tail = facts[0].form.question.partition(" {key}")
        question = self.encode(head if chat else f" {head}")
        answer = Parts()
        # Keys then begin with a space, as they do in the question: the same tokens.
        answer.add(self.encode(SEVERAL if chat else f" {SEVERAL}"), ANSWER)
        for place, fact in enumerate(facts):
            if place:
                question += self.encode(",")
                answer.add(self.encode(","), ANSWER)
            if place and place == len(facts) - 1:
                question += self.encode(" and")
            question += self.key(fact.key)
            answer.add(self.key(fact.key), ANSWER)
            answer.add(self.encode(":") + self.spelled(fact.values[0]), ANSWER)
        answer.add(self.encode("."), ANSWER)
        return self._ask(question + self.encode(tail), answer, chat=chat)

    def trace_query(self, chain: Sequence[str], value: str, *, chat: bool) -> Parts:
        """`Trace VAR C.` answered by `VAR C = VAR B = VAR A = 12345.`; the chain ends with C."""
        space = "" if chat else " "
        question = self.encode(f"{space}Trace") + self.encode(" VAR")
        question += self.encode(f" {chain[-1]}") + self.encode(".")
        answer = Parts()
        answer.add(self.encode(f"{space}VAR") + self.encode(f" {chain[-1]}"), TEXT)
        for name in reversed(chain[:-1]):
            step = self.encode(" =") + self.encode(" VAR") + self.encode(f" {name}")
            answer.add(step, ANSWER)
        answer.add(self.encode(" =") + self.encode(" ") + self.number(value), ANSWER)
        answer.add(self.encode("."), ANSWER)
        return self._ask(question, answer, chat=chat)

    def _ask(self, question: Sequence[int], answer: Parts, *, chat: bool) -> Parts:
        parts = Parts()
        newline = self.encode("\n")
        if chat:
            parts.add((*question, END_ID, *newline, ASSISTANT_ID, *newline), NONE)
        else:
            prompt = (*self.encode("Question:"), *question, *newline)
            parts.add((*prompt, *self.encode("Answer:")), NONE)
        parts.extend(answer)
        parts.add((END_ID if chat else EOS_ID,), ANSWER)
        return parts
