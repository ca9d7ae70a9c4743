"""Tasks that a model can fail: documents with facts in them, and questions about these facts.

The forms are RULER's (Hsieh et al. 2024); an answer's score is how many of its references it
mentions. A majority is told by no few sentences: a policy that reads few of the votes must guess.
Everything is drawn from a generator, so a seed repeats it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from models.training.tasks import KEY_VALUE, MAJORITY, RULER, held_out_key, magic_number
from service.eval.free_text import FreeTask, begun
from service.eval.passages import PassageTask, continued, repeated

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from service.eval.source import Source

KEYS = 5000
"""Most facts of a `multi-key` document, some 115,000 tokens: there are 6,090 keys to draw from."""
BALLOTS = 4
"""Ballots of a `majority` document, each with as many votes."""
VOTES = 256
"""Most votes of a ballot."""
TOKENS_A_VOTE = 150
"""A vote of each ballot for so many tokens of a document: at 18 tokens a vote nearly half of it."""
MARGIN = 0.07
"""The winner's share of the votes less the loser's."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question and what its answer must mention.

    Attributes:
        rivals: wrong verdicts. Where there are any, what counts is the text behind the last colon:
            a reference must stand there as a word, and no rival.
    """

    text: str
    references: tuple[str, ...]
    rivals: tuple[str, ...] = ()

    def found(self, answer: str) -> int:
        """How many of the references the answer mentions, upper or lower case."""
        answer = answer.lower()
        if not self.rivals:
            return sum(reference.lower() in answer for reference in self.references)
        verdict = set(re.findall(r"\w+", answer.rpartition(":")[2]))
        if any(rival.lower() in verdict for rival in self.rivals):
            return 0
        return sum(reference.lower() in verdict for reference in self.references)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the questions about it."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of document.

    Attributes:
        make: from a generator, a source, the document's tokens and the most questions to ask.
        answer_tokens: most tokens of an answer to one question.
        questions: that can be asked about a document, if no fewer are wanted.
        references: of a question.
    """

    name: str
    make: Callable[[np.random.Generator, Source, int, int], Document]
    answer_tokens: int
    questions: int
    references: int = 1

    def documents(self, answers: int, questions: int) -> int:
        """Documents for so many answers, at most `questions` questions about each."""
        return -(-answers // (min(questions, self.questions) * self.references))


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[held_out_key(rng)] = None
    return list(keys)


def _hidden(rng: np.random.Generator, source: Source, tokens: int, facts: Sequence[str]) -> str:
    """`facts`, in their order, at random places of a text of `tokens` tokens, facts included."""
    room = tokens - sum(len(source.encode(" " + fact)) for fact in facts)
    sentences = source.sentences(rng, room)
    places = sorted(rng.integers(0, len(sentences) + 1, len(facts)).tolist(), reverse=True)
    for place, fact in zip(places, reversed(facts), strict=True):
        sentences.insert(place, " " + fact)
    return "".join(sentences).strip()


def _fact(key: str, value: str) -> str:
    return RULER.needle.format(key=key, value=value)


def _about(keys: Sequence[str], values: Sequence[str]) -> Question:
    """RULER's question about one key or several, answered by all of their values."""
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return Question(RULER.question.format(key=named), tuple(values))


def _needles(count: int) -> Callable[[np.random.Generator, Source, int, int], Document]:
    """`count` facts about different keys, asked for one by one."""

    def make(rng: np.random.Generator, source: Source, tokens: int, most: int) -> Document:
        keys = _keys(rng, count)
        values = [magic_number(rng) for _ in keys]
        text = _hidden(
            rng, source, tokens, [_fact(*pair) for pair in zip(keys, values, strict=True)]
        )
        asked = rng.permutation(count)[:most].tolist()
        return Document(text, tuple(_about([keys[i]], [values[i]]) for i in asked))

    return make


def _multi_key(rng: np.random.Generator, source: Source, tokens: int, most: int) -> Document:
    """Nothing but facts, each the others' distractor."""
    facts: list[tuple[str, str, str]] = []
    used: set[str] = set()
    while len(used) < KEYS:
        key, value = held_out_key(rng), magic_number(rng)
        if key in used:
            continue
        sentence = _fact(key, value)
        tokens -= len(source.encode(" " + sentence))
        if tokens < 0:
            break
        used.add(key)
        facts.append((key, value, sentence))
    asked = [facts[i] for i in rng.permutation(len(facts))[:most].tolist()]
    text = " ".join(sentence for _, _, sentence in facts)
    return Document(text, tuple(_about([key], [value]) for key, value, _ in asked))


def _multi_value(rng: np.random.Generator, source: Source, tokens: int, most: int) -> Document:
    """Four values of each of four keys, all to be named."""
    keys = _keys(rng, 4)
    values = [[magic_number(rng) for _ in range(4)] for _ in keys]
    facts = [_fact(key, value) for key, some in zip(keys, values, strict=True) for value in some]
    shuffled = [facts[i] for i in rng.permutation(len(facts)).tolist()]
    text = _hidden(rng, source, tokens, shuffled)
    questions = [_about([key], some) for key, some in zip(keys, values, strict=True)]
    return Document(text, tuple(questions[:most]))


def _multi_query(count: int) -> Callable[[np.random.Generator, Source, int, int], Document]:
    """Sixteen facts, of which each question asks for `count` at once."""

    def make(rng: np.random.Generator, source: Source, tokens: int, most: int) -> Document:
        keys = _keys(rng, 16)
        values = [magic_number(rng) for _ in keys]
        text = _hidden(
            rng, source, tokens, [_fact(*pair) for pair in zip(keys, values, strict=True)]
        )
        groups = [range(start, start + count) for start in range(0, 16, count)]
        questions = [_about([keys[i] for i in one], [values[i] for i in one]) for one in groups]
        return Document(text, tuple(questions[:most]))

    return make


def _variables(*, walked: bool) -> Callable[[np.random.Generator, Source, int, int], Document]:
    """Four chains of assignments over four hops, to be `walked` back in writing.

    Else the last variable's value is asked for, and nothing may be written down on the way.
    """

    def make(rng: np.random.Generator, source: Source, tokens: int, most: int) -> Document:
        letters = rng.integers(0, 26, (64, 5)) + ord("A")
        names = list(dict.fromkeys("".join(map(chr, row)) for row in letters.tolist()))
        chains, values = [names[5 * i : 5 * i + 5] for i in range(4)], []
        queues: list[list[str]] = []
        for chain in chains:
            value = magic_number(rng, digits=5)
            values.append(value)
            first = f"VAR {chain[0]} = {value}."
            rest = [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
            queues.append([first, *rest])
        # Chains are mixed, each in its own order.
        order = rng.permutation([number for number in range(4) for _ in range(5)]).tolist()
        text = _hidden(rng, source, tokens, [queues[number].pop(0) for number in order])
        questions = [
            Question(f"Trace VAR {chain[-1]}.", (*chain, value))
            if walked
            else Question(KEY_VALUE.question_one.format(key=f"VAR {chain[-1]}"), (value,))
            for chain, value in zip(chains, values, strict=True)
        ]
        return Document(text, tuple(questions[:most]))

    return make


def votes(tokens: int, vote_tokens: int = 0) -> int:
    """Votes of each ballot in a document of `tokens` tokens.

    Args:
        tokens: of the document.
        vote_tokens: of the longest vote. Where a tokenizer makes them long, votes are fewer, so
            that a third of the document stays prose.
    """
    return max(1, min(VOTES, tokens // max(TOKENS_A_VOTE, BALLOTS * vote_tokens * 3 // 2)))


def winning(count: int) -> int:
    """How many of a ballot's `count` votes are the winner's: always more than half."""
    return max(math.ceil(count * (0.5 + MARGIN / 2)), count // 2 + 1)


def _majority(rng: np.random.Generator, source: Source, tokens: int, most: int) -> Document:
    """Votes on four ballots, mixed; each is asked which of yes and no are more."""
    keys = _keys(rng, BALLOTS)
    longest = max(len(source.encode(" " + _vote(key, "yes"))) for key in keys)
    count = votes(tokens, longest)
    facts, questions = [], []
    for key in keys:
        winner, loser = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
        right = winning(count)
        facts += [_vote(key, winner)] * right + [_vote(key, loser)] * (count - right)
        questions.append(Question(MAJORITY.question.format(key=key), (winner,), (loser,)))
    shuffled = [facts[i] for i in rng.permutation(len(facts)).tolist()]
    return Document(_hidden(rng, source, tokens, shuffled), tuple(questions[:most]))


def _vote(key: str, value: str) -> str:
    return MAJORITY.needle.format(key=key, value=value)


TASKS: dict[str, Task | PassageTask | FreeTask] = {
    task.name: task
    for task in (
        Task("needle", _needles(1), 48, questions=1),
        Task("needles", _needles(16), 48, questions=16),
        Task("multi-key", _multi_key, 48, questions=16),
        Task("multi-value", _multi_value, 96, questions=4, references=4),
        Task("multi-query-4", _multi_query(4), 128, questions=4, references=4),
        Task("multi-query-16", _multi_query(16), 400, questions=1, references=16),
        Task("variables", _variables(walked=True), 96, questions=4, references=6),
        Task("variables-asked", _variables(walked=False), 48, questions=4),
        Task("majority", _majority, 48, questions=BALLOTS),
        PassageTask("text", continued),
        PassageTask("repeats", repeated),
        FreeTask("free-text", begun, 256, questions=10),
    )
}
