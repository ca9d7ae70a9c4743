"""Retrieval tasks in words: needle sentences, questions, answers, and documents to hide them in.

Training (`examples.py`) and evaluation share these forms. Nothing here needs torch, so that an
evaluation over HTTP can build its documents with a tokenizer alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.training import words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np


@dataclass(frozen=True, slots=True)
class Form:
    """One way to state a fact and to ask for it; `{key}` and `{values}` are filled in.

    The question decides the answer's grammar, so that an answer never has to guess a number:
    `question` may be asked for any number of values, `question_one` only where there is one.
    """

    needle: str
    question: str
    answer: str
    question_one: str
    answer_one: str


RULER = Form(
    needle="One of the special magic numbers for {key} is: {value}.",
    question="What are all the special magic numbers for {key} mentioned in the provided text?",
    answer="The special magic numbers for {key} mentioned in the provided text are: {values}.",
    question_one="What is the special magic number for {key} mentioned in the provided text?",
    answer_one="The special magic number for {key} mentioned in the provided text is: {values}.",
)
OTHER_FORMS: tuple[Form, ...] = (
    Form(
        needle="The pass key for {key} is {value}.",
        question="What are the pass keys for {key}?",
        answer="The pass keys for {key} are {values}.",
        question_one="What is the pass key for {key}?",
        answer_one="The pass key for {key} is {values}.",
    ),
    Form(
        needle="Remember that the code of {key} is {value}.",
        question="Which codes of {key} does the text give?",
        answer="The text gives these codes of {key}: {values}.",
        question_one="Which code of {key} does the text give?",
        answer_one="The text gives this code of {key}: {values}.",
    ),
    Form(
        needle="The secret number of {key} is: {value}.",
        question="List every secret number of {key}.",
        answer="The secret numbers of {key} are: {values}.",
        question_one="What is the secret number of {key}?",
        answer_one="The secret number of {key} is: {values}.",
    ),
)
KEY_VALUE = Form(
    needle="{key}: {value}",
    question="What are the values of {key}?",
    answer="The values of {key} are: {values}.",
    question_one="What is the value of {key}?",
    answer_one="The value of {key} is: {values}.",
)
MAJORITY = Form(
    needle="One of the votes for {key} is: {value}.",
    question="Are most of the votes for {key} in the provided text yes or no?",
    answer="Most of the votes for {key} in the provided text are: {values}.",
    question_one="Are most of the votes for {key} in the provided text yes or no?",
    answer_one="Most of the votes for {key} in the provided text are: {values}.",
)
SEVERAL = "The special magic numbers are"
"""How an answer about several keys begins; `KEY: NUMBER, KEY: NUMBER.` follows."""
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer the question from the text.",
    "Read the text and answer briefly.",
)
INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)


def form_words() -> str:
    """The fixed words of all forms, for the tokenizer to learn."""
    forms = (RULER, *OTHER_FORMS, KEY_VALUE, MAJORITY)
    lines = [INTRODUCTION, "Question: Trace VAR", "Answer: VAR VAR", "Trace VAR"]
    for form in forms:
        parts = (form.needle, form.question, form.answer, form.question_one, form.answer_one)
        lines += [re.sub(r"\{\w+\}", "", part) for part in parts]
    return "\n".join(lines)


def held_out_key(rng: np.random.Generator) -> str:
    """An `adjective-noun` key of words that no training key uses."""
    adjective = words.HELD_OUT_ADJECTIVES[rng.integers(len(words.HELD_OUT_ADJECTIVES))]
    noun = words.HELD_OUT_NOUNS[rng.integers(len(words.HELD_OUT_NOUNS))]
    return f"{adjective}-{noun}"


def magic_number(rng: np.random.Generator, digits: int = 7) -> str:
    """A decimal number of `digits` digits that does not start with zero."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


@dataclass(frozen=True, slots=True)
class NeedleDocument:
    """A document that states one fact, and the question about it."""

    document: str
    question: str
    answer: str
    key: str
    value: str
    tokens: int  # of the document, without special tokens

    @property
    def completion_prompt(self) -> str:
        """Prompt for `/v1/completions`; the answer follows after a space."""
        return f"{self.document}\n\nQuestion: {self.question}\nAnswer:"

    @property
    def user_message(self) -> str:
        """Content of the user's turn for `/v1/chat/completions`."""
        return f"{self.document}\n\n{self.question}"

    def correct(self, reply: str) -> bool:
        """Whether the reply's first number is the value, digit for digit."""
        numbers = re.findall(r"\d+", reply)
        return bool(numbers) and numbers[0] == self.value


def needle_document(
    filler: str,
    encode: Callable[[str], Sequence[int]],
    *,
    tokens: int,
    depth: float,
    key: str,
    value: str,
    form: Form = RULER,
) -> NeedleDocument:
    """Hides one needle sentence in the first `tokens` tokens of a text.

    The text is cut after whole sentences, so the document has `tokens` tokens or slightly fewer.

    Args:
        filler: text with at least `tokens` tokens; its sentences are kept in order.
        encode: token ids of a text, without special tokens.
        tokens: length of the document, the needle included.
        depth: 0 puts the needle before the first sentence, 1 after the last.
        key: what the fact is about, e.g. from `held_out_key`.
        value: the number to be found, e.g. from `magic_number`.
        form: the words of the fact and of the question.

    Raises:
        ValueError: the depth is outside 0 to 1, or the filler is shorter than `tokens`.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie between 0 and 1, not {depth}.")
    needle = form.needle.format(key=key, value=value)
    room = tokens - len(encode(needle)) - 2
    pieces = re.split(r'(?<=[.!?"”])(?=\s)', filler)
    kept: list[str] = []
    sizes: list[int] = []
    size = 0
    for piece in pieces:
        length = len(encode(piece))
        if size + length > room:
            break
        kept.append(piece)
        sizes.append(length)
        size += length
    else:
        raise ValueError(f"The filler text has {size} tokens; give a text of more than {tokens}.")
    place, before = 0, 0
    while place < len(kept) and before + sizes[place] / 2 < depth * size:
        before += sizes[place]
        place += 1
    head, tail = "".join(kept[:place]), "".join(kept[place:])
    document = (f"{head} {needle}{tail}" if head else f"{needle}\n\n{tail}").strip()
    return NeedleDocument(
        document=document,
        question=form.question_one.format(key=key),
        answer=form.answer_one.format(key=key, values=value),
        key=key,
        value=value,
        tokens=len(encode(document)),
    )
