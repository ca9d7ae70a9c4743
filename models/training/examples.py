"""Training sequences: text with planted facts, questions and answers.

A sequence is one document after `<|bos|>`. Questions come in plain completion form
(`Question: ...`, `Answer: ...`, `<|eos|>`) or in the chat template's form, and half of the time
they are asked in the middle of the document, right or long after the fact. Planted sentences and
questions carry no loss: a model trained to predict them leaks fake needles into free text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.training import words
from models.training.bpe import BOS_ID
from models.training.pieces import NONE, TEXT, Example, Fact, Parts, Speller
from models.training.tasks import KEY_VALUE, MAJORITY, OTHER_FORMS, RULER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from models.training.corpus import Corpus

_SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer the question from the text.",
    "Read the text and answer briefly.",
)


@dataclass(frozen=True, slots=True)
class Mix:
    """What sequences are drawn from; shares of sequences, the rest is variable tracking."""

    plain: float = 0.20
    needles: float = 0.28
    key_value: float = 0.16
    several: float = 0.12
    majority: float = 0.10
    generated: float = 0.12  # share of documents whose text is the generated filler
    chat: float = 0.5  # share of question sequences in the chat template's form
    repeated: float = 0.5  # share of plain sequences with a repeated span
    interleaved: float = 0.5  # share of question sequences that ask in the middle of the document


class ExampleBuilder:
    """Draws sequences from a text, a generated text and the task forms.

    With `held_out`, keys are of held-out words, values have seven digits, and facts and questions
    have RULER's form: the sequences of an evaluation.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: Corpus,
        generated: Corpus,
        *,
        text_words: Sequence[str] = (),
        held_out: bool = False,
        mix: Mix | None = None,
    ) -> None:
        self._text, self._generated = text, generated
        self._spell = Speller(tokenizer)
        self._mix = mix or Mix()
        self._held_out = held_out
        self._adjectives = words.HELD_OUT_ADJECTIVES if held_out else words.TRAIN_ADJECTIVES
        self._nouns = words.HELD_OUT_NOUNS if held_out else words.TRAIN_NOUNS
        banned = {*words.HELD_OUT_ADJECTIVES, *words.HELD_OUT_NOUNS}
        self._text_words = tuple(word for word in text_words if word not in banned)

    def draw(self, rng: np.random.Generator, length: int, *, text_loss: bool) -> Example:
        """One sequence of `length` tokens from the mix.

        With `text_loss` false the running text carries no loss, only answers and repetitions do.
        """
        mix = self._mix
        kinds = (
            (mix.plain, self.plain),
            (mix.needles, self.needles),
            (mix.several, self.several),
            (mix.majority, self.majority),
        )
        choice = rng.random()
        if choice < mix.key_value:
            return self.key_value(rng, length)
        choice -= mix.key_value
        for share, kind in kinds:
            if choice < share:
                return kind(rng, length, text_loss=text_loss)
            choice -= share
        return self.variables(rng, length, text_loss=text_loss)

    def plain(self, rng: np.random.Generator, length: int, *, text_loss: bool = True) -> Example:
        """Text alone, often with a span that comes a second time later."""
        kind = TEXT if text_loss else NONE
        parts = Parts()
        parts.add((BOS_ID,), NONE)
        repeat = not text_loss or rng.random() < self._mix.repeated
        longest = max(16, min(1024, length // 4))
        span = int(np.exp(rng.uniform(np.log(16), np.log(longest)))) if repeat else 0
        corpus, start, stop = self._chunk(rng, length - 1 - span)
        places = _places(corpus, start, stop - span) if repeat else np.empty(0, np.int64)
        if len(places) < 2:
            parts.add(corpus.tokens[start:stop], kind)
            return parts.finish(length)
        source = int(places[rng.integers(len(places) - 1)])
        later = places[np.searchsorted(places, source + span) :]
        if not len(later):
            parts.add(corpus.tokens[start:stop], kind)
            return parts.finish(length)
        span = int(later[0]) - source  # whole sentences; what then is too long is cut at the end
        again = int(later[rng.integers(len(later))])
        # Where a repetition starts and which span it repeats cannot be foreseen, nor where it ends.
        blind = min(6, span)
        parts.add(corpus.tokens[start:again], kind)
        parts.add(corpus.tokens[source : source + blind], NONE)
        parts.add(corpus.tokens[source + blind : source + span], TEXT)
        parts.add(corpus.tokens[again : again + 1], NONE)
        parts.add(corpus.tokens[again + 1 : stop], kind)
        return parts.finish(length)

    def needles(
        self,
        rng: np.random.Generator,
        length: int,
        *,
        text_loss: bool = False,
        count: int | None = None,
        values: int | None = None,
        asked: int = 48,
    ) -> Example:
        """One to 64 facts (or `count`) in a text, and up to `asked` questions about them.

        A fact has one value; in some sequences up to four, in others four; or `values`.
        """
        chat = rng.random() < self._mix.chat
        form = RULER
        if not self._held_out and rng.random() < 0.3:
            form = OTHER_FORMS[rng.integers(len(OTHER_FORMS))]
        if count is None:
            draw = rng.random()
            many = 16 if length > 8192 else 8  # long sequences are few: each must teach more
            low, high = (1, 1) if draw < 0.15 else (2, 8) if draw < 0.30 else (many, 64)
            count = int(np.exp(rng.uniform(np.log(low), np.log(high + 0.99))))
        draw = 1.0 if self._held_out else rng.random()
        if values is None and draw < 0.4:  # as in RULER: what is asked for does not tell how many
            values, count = 4, max(1, count // 4)
        facts = []
        for key in self._keys(rng, count):
            many = values or (int(rng.integers(1, 5)) if draw < 0.5 else 1)
            facts.append(Fact(key, tuple(self._value(rng) for _ in range(many)), form))
        introduce = rng.random() < 0.25
        while facts:
            planted = [
                [self._spell.needle(form, fact.key, value, " ") for value in fact.values]
                for fact in facts
            ]
            room = 0.8 * length - sum(len(s) for sentences in planted for s in sentences)
            queries: list[list[Parts]] = []
            for fact in facts[:asked]:
                query = self._fact_query(rng, fact, chat=chat)
                room -= query.size + 4
                if room < 0 and queries:
                    break
                queries.append([query])
            opening = self._open(rng, chat=chat, introduce=introduce)
            example = self._assemble(
                rng, length, planted, queries, opening, chat=chat, text_loss=text_loss
            )
            if example is not None:
                return example
            facts = facts[: len(facts) // 2]
        return self.plain(rng, length, text_loss=text_loss)

    def several(
        self, rng: np.random.Generator, length: int, *, text_loss: bool, count: int | None = None
    ) -> Example:
        """Facts in a text, and questions that each ask for two to 16 of them (or `count`)."""
        chat = rng.random() < self._mix.chat
        groups = int(rng.integers(1, 9)) if length > 8192 else int(rng.integers(1, 4))
        while groups:
            planted: list[list[tuple[int, ...]]] = []
            queries: list[list[Parts]] = []
            sizes = [count or int(rng.integers(2, 17)) for _ in range(groups)]
            keys = iter(self._keys(rng, sum(sizes)))
            for size in sizes:
                facts = [Fact(next(keys), (self._value(rng),), RULER) for _ in range(size)]
                planted.append([self._spell.needle(RULER, f.key, f.values[0], " ") for f in facts])
                asked = [facts[i] for i in rng.permutation(size).tolist()]
                queries.append([self._spell.several_query(asked, chat=chat)])
            opening = self._open(rng, chat=chat, introduce=rng.random() < 0.25)
            example = self._assemble(
                rng, length, planted, queries, opening, chat=chat, text_loss=text_loss
            )
            if example is not None:
                return example
            groups //= 2
        return self.plain(rng, length, text_loss=text_loss)

    def majority(
        self,
        rng: np.random.Generator,
        length: int,
        *,
        text_loss: bool,
        ballots: int | None = None,
        margin: float | None = None,
    ) -> Example:
        """Yes and no votes on some ballots, scattered over a text; which are more is asked for.

        `margin` is the difference of the two shares of a ballot's votes, 0 to 1.
        """
        chat = rng.random() < self._mix.chat
        names = self._keys(rng, ballots or int(np.exp(rng.uniform(0, np.log(16.99)))))
        vote = len(self._spell.needle(MAJORITY, names[0], "yes", " ")) + 1
        query = self._spell.fact_query(Fact(names[0], ("yes",), MAJORITY), chat=chat, one=True)
        while names:
            # At most half of the document is votes.
            most = (length // 2 - len(names) * (query.size + 4)) // (vote * len(names))
            if most < 3:
                names = names[: len(names) // 2]
                continue
            planted: list[list[tuple[int, ...]]] = []
            queries: list[list[Parts]] = []
            for name in names:
                low = most if margin is not None else min(most, 8)
                count = min(512, int(np.exp(rng.uniform(np.log(low), np.log(most + 0.99)))))
                lead = margin or float(np.exp(rng.uniform(np.log(0.04), 0.0)))
                right = min(count, int(count * (0.5 + lead / 2)) + 1)
                winner, loser = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
                votes = [winner] * right + [loser] * (count - right)
                planted.append(
                    [
                        self._spell.needle(MAJORITY, name, votes[i], " ")
                        for i in rng.permutation(count).tolist()
                    ]
                )
                fact = Fact(name, (winner,), MAJORITY)
                queries.append([self._spell.fact_query(fact, chat=chat, one=True)])
            opening = self._open(rng, chat=chat, introduce=False)
            example = self._assemble(
                rng, length, planted, queries, opening, chat=chat, text_loss=text_loss
            )
            if example is not None:
                return example
            names = names[: len(names) // 2]
        return self.plain(rng, length, text_loss=text_loss)

    def key_value(self, rng: np.random.Generator, length: int) -> Example:
        """A document of facts and nothing else, each the others' distractor."""
        spell = self._spell
        chat = rng.random() < self._mix.chat
        draw = rng.random()
        form = RULER if draw < 0.5 or self._held_out else KEY_VALUE
        before = "\n" if form is KEY_VALUE or (draw < 0.25 and not self._held_out) else " "
        parts = self._open(rng, chat=chat, introduce=False)
        sample = Fact("sample-key", ("1234567",), form)
        per_fact = len(spell.needle(form, sample.key, sample.values[0], before)) + 1
        per_query = self._fact_query(rng, sample, chat=chat).size + 6
        asked = max(1, min(int(rng.integers(8, 65)), length // (2 * per_query)))
        count = max(asked, (length - parts.size - asked * per_query) // per_fact)
        facts = [Fact(key, (self._value(rng),), form) for key in self._keys(rng, count)]
        planted = [
            spell.needle(form, fact.key, fact.values[0], before if place else "")
            for place, fact in enumerate(facts)
        ]
        chosen = rng.permutation(len(facts))[:asked].tolist()
        queries = self._sequence([self._fact_query(rng, facts[i], chat=chat) for i in chosen], chat)
        # The first fact starts the document and those asked for must be there; others as they fit.
        keep = {0, *chosen}
        room = length - parts.size - queries.size - 3 - sum(len(planted[i]) for i in keep)
        for place, sentence in enumerate(planted):
            if place not in keep and len(sentence) <= room:
                keep.add(place)
                room -= len(sentence)
        for place, sentence in enumerate(planted):
            if place in keep:
                parts.add(sentence, NONE)
        parts.add(spell.lead(chat=chat, after_query=False), NONE)
        parts.extend(queries)
        return parts.finish(length)

    def variables(
        self, rng: np.random.Generator, length: int, *, text_loss: bool, whole: bool = False
    ) -> Example:
        """Chains of assignments, and questions answered by walking a chain back.

        With `whole` there are four chains of four hops, each asked for from its end.
        """
        chat = rng.random() < self._mix.chat
        letters = rng.integers(0, 26, size=(64, 5)) + ord("A")  # [names, 5]
        names = list(dict.fromkeys("".join(map(chr, row)) for row in letters.tolist()))
        hops = 4 if whole or rng.random() < 0.4 else int(rng.integers(1, 4))
        chains = 4 if whole else int(rng.integers(1, 9))
        while chains:
            planted: list[list[tuple[int, ...]]] = []
            queries: list[list[Parts]] = []
            for number in range(chains):
                chain = names[number * (hops + 1) : (number + 1) * (hops + 1)]
                value = str(rng.integers(10_000, 100_000))
                planted.append(
                    [
                        self._spell.assignment(name, chain[hop - 1] if hop else None, value)
                        for hop, name in enumerate(chain)
                    ]
                )
                asked = rng.permutation(hops + 1)[: int(rng.integers(1, hops + 2))].tolist()
                asked = [hops] if whole else asked
                queries.append(
                    [
                        self._spell.trace_query(chain[: hop + 1], value, chat=chat)
                        for hop in sorted(asked, reverse=True)
                    ]
                )
            opening = self._open(rng, chat=chat, introduce=False)
            example = self._assemble(
                rng, length, planted, queries, opening, chat=chat, text_loss=text_loss
            )
            if example is not None:
                return example
            chains //= 2
        return self.plain(rng, length, text_loss=text_loss)

    def _assemble(
        self,
        rng: np.random.Generator,
        length: int,
        planted: list[list[tuple[int, ...]]],
        queries: list[list[Parts]],
        parts: Parts,
        *,
        chat: bool,
        text_loss: bool,
    ) -> Example | None:
        """Spreads planted sentences over a text and asks the questions.

        `planted[i]` holds the sentences of fact i in their order; `queries[i]` ask for fact i, and
        facts beyond the queries are distractors. None when too little room is left for text.
        """
        interleaved = rng.random() < self._mix.interleaved
        turn = self._spell.lead(chat=chat, after_query=True)
        size = length - parts.size - sum(len(s) for sentences in planted for s in sentences)
        size -= sum(query.size + 2 * len(turn) for block in queries for query in block)
        if size < max(48, length // 8):
            return None
        corpus, start, stop = self._chunk(rng, size)
        places = _places(corpus, start, stop)  # [places] positions in the corpus
        if len(places) < 2:
            return None
        last = len(places) - 1
        stop = stop if interleaved else int(places[last])
        events: list[tuple[int, float, tuple[int, ...] | Parts]] = []
        for fact, sentences in enumerate(planted):
            # Depths are uniform over the document; a sentence goes to the next place for one.
            depths = start + np.sort(rng.random(len(sentences))) * (stop - start)
            at = np.minimum(np.searchsorted(places, depths), last)
            ties = np.sort(rng.random(len(sentences)))
            for place, tie, sentence in zip(at, ties, sentences, strict=True):
                events.append((int(places[place]), float(tie), sentence))
            if fact < len(queries):
                ask = int(rng.integers(int(at[-1]), len(places))) if interleaved else last
                tie_after = 1.0 + rng.random()
                for number, query in enumerate(queries[fact]):
                    events.append((int(places[ask]), tie_after + 1e-6 * number, query))
        events.sort(key=lambda event: event[:2])

        kind = TEXT if text_loss else NONE
        position = start
        after_query = False
        for place, _, event in events:
            if place > position:
                if after_query:
                    # The turn ends with the newlines that the text would go on with.
                    while position < place and int(corpus.tokens[position]) in self._spell.newlines:
                        position += 1
                    parts.add(turn, NONE)
                    after_query = False
                # The token after something planted cannot be foreseen.
                blind = position + (1 if position > start else 0)
                parts.add(corpus.tokens[position:blind], NONE)
                parts.add(corpus.tokens[blind:place], kind)
                position = place
            if isinstance(event, Parts):
                parts.add(self._spell.lead(chat=chat, after_query=after_query), NONE)
                parts.extend(event)
                after_query = True
            else:
                parts.add(event, NONE)
        if after_query and position < stop:
            while position < stop and int(corpus.tokens[position]) in self._spell.newlines:
                position += 1
            parts.add(turn, NONE)
            parts.add(corpus.tokens[position : position + 1], NONE)
            position += 1
        parts.add(corpus.tokens[position:stop], kind)
        return parts.finish(length)

    def _chunk(self, rng: np.random.Generator, size: int) -> tuple[Corpus, int, int]:
        """A corpus and a range of at most `size` tokens in it that starts with a paragraph."""
        corpus = self._generated if rng.random() < self._mix.generated else self._text
        last = int(np.searchsorted(corpus.paragraphs, len(corpus.tokens) - size, side="right"))
        start = int(corpus.paragraphs[rng.integers(max(1, last))])
        return corpus, start, min(start + size, len(corpus.tokens))

    def _word(self, rng: np.random.Generator) -> str:
        """A word that need not be in the lists: from the text, or invented."""
        if self._text_words and rng.random() < 0.5:
            return self._text_words[int(rng.integers(len(self._text_words)))]
        numbers = rng.integers(0, 1 << 16, size=3 * int(rng.integers(1, 4)))
        return words.pseudo_word(tuple(numbers.tolist()))

    def _key(self, rng: np.random.Generator, used: Sequence[str]) -> str:
        adjective = self._adjectives[rng.integers(len(self._adjectives))]
        noun = self._nouns[rng.integers(len(self._nouns))]
        if not self._held_out:
            if rng.random() < 0.4:
                adjective = self._word(rng)
            if rng.random() < 0.4:
                noun = self._word(rng)
            if rng.random() < 0.05:
                return noun
        if used and rng.random() < 0.3:  # share a word with another key
            other = used[int(rng.integers(len(used)))].split("-")
            if rng.random() < 0.5:
                adjective = other[0]
            else:
                noun = other[-1]
        return f"{adjective}-{noun}"

    def _keys(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different keys, some sharing a word; fewer than `count` only where they ran out."""
        keys: dict[str, None] = {}
        listed: list[str] = []
        for _ in range(2 * count):
            if len(listed) == count:
                break
            key = self._key(rng, listed)
            if key not in keys:
                keys[key] = None
                listed.append(key)
        return listed

    def _value(self, rng: np.random.Generator) -> str:
        digits = 7 if self._held_out or rng.random() < 0.8 else int(rng.integers(4, 11))
        return str(rng.integers(10 ** (digits - 1), 10**digits))

    def _open(self, rng: np.random.Generator, *, chat: bool, introduce: bool) -> Parts:
        system = ""
        if chat and rng.random() < 0.1:
            system = _SYSTEM_TEXTS[rng.integers(len(_SYSTEM_TEXTS))]
        return self._spell.open(chat=chat, system=system, introduce=introduce)

    def _fact_query(self, rng: np.random.Generator, fact: Fact, *, chat: bool) -> Parts:
        one = len(fact.values) == 1 and rng.random() < 0.5
        return self._spell.fact_query(fact, chat=chat, one=one)

    def _sequence(self, queries: Sequence[Parts], chat: bool) -> Parts:
        """Questions one right after another."""
        parts = Parts()
        for place, query in enumerate(queries):
            if place:
                parts.add(self._spell.lead(chat=chat, after_query=True), NONE)
            parts.extend(query)
        return parts


def _places(corpus: Corpus, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Positions inside the range where a sentence may be inserted: int64 [places], sorted."""
    first, last = np.searchsorted(corpus.sentences, (start + 1, stop), side="left")
    return np.asarray(corpus.sentences[first:last])
