"""Training sequences: text with planted facts, questions and answers.

A sequence is one document after `<|bos|>`. Questions come in plain completion form
(`Question: ...`, `Answer: ...`, `<|eos|>`) or in the chat template's form, and half of the time
they are asked in the middle of the document, right or long after the fact. Planted sentences and
questions carry no loss: a model trained to predict them leaks fake needles into free text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from models.training.bpe import BOS_ID
from models.training.mix import Mix
from models.training.names import Names
from models.training.pieces import NONE, TEXT, Example, Fact, Parts, Speller
from models.training.planting import Planted, Texts, assemble, one_after_another, places_in
from models.training.tasks import KEY_VALUE, MAJORITY, OTHER_FORMS, RULER, SYSTEM_TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

    from models.training.corpus import Corpus

Thing = TypeVar("Thing")
"""What a document is about: facts, ballots, chains."""


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
        self._spell = Speller(tokenizer)
        self._mix = mix or Mix()
        self._texts = Texts(text, generated, self._mix.generated)
        self._held_out = held_out
        self._names = Names(text_words, held_out=held_out)

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
        corpus, start, stop = self._texts.draw(rng, length - 1 - span)
        places = places_in(corpus, start, stop - span) if repeat else np.empty(0, np.int64)
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
        if values is None and draw < self._mix.four_values:
            values, count = 4, max(1, count // 4)
        facts = []
        for key in self._names.keys(rng, count):
            many = values or (int(rng.integers(1, 5)) if draw < self._mix.four_values + 0.1 else 1)
            facts.append(Fact(key, tuple(self._names.value(rng) for _ in range(many)), form))
        introduce = rng.random() < 0.25

        def plant(facts: Sequence[Fact]) -> Planted:
            sentences = [
                [self._spell.needle(form, fact.key, value, " ") for value in fact.values]
                for fact in facts
            ]
            room = 0.8 * length - sum(len(s) for some in sentences for s in some)
            queries: list[list[Parts]] = []
            for fact in facts[:asked]:
                query = self._fact_query(rng, fact, chat=chat)
                room -= query.size + 4
                if room < 0 and queries:
                    break
                queries.append([query])
            opening = self._open(rng, chat=chat, introduce=introduce)
            return Planted(sentences, queries, opening, chat)

        return self._document(rng, length, facts, plant, text_loss=text_loss)

    def several(
        self, rng: np.random.Generator, length: int, *, text_loss: bool, count: int | None = None
    ) -> Example:
        """Facts in a text, and questions that each ask for two to 16 of them (or `count`)."""
        chat = rng.random() < self._mix.chat
        groups = int(rng.integers(1, 9)) if length > 8192 else int(rng.integers(1, 4))

        def plant(groups: Sequence[int]) -> Planted:
            sentences: list[list[tuple[int, ...]]] = []
            queries: list[list[Parts]] = []
            sizes = [count or int(rng.integers(2, 17)) for _ in groups]
            keys = iter(self._names.keys(rng, sum(sizes)))
            for size in sizes:
                facts = [Fact(next(keys), (self._names.value(rng),), RULER) for _ in range(size)]
                sentences.append(
                    [self._spell.needle(RULER, f.key, f.values[0], " ") for f in facts]
                )
                asked = [facts[i] for i in rng.permutation(size).tolist()]
                queries.append([self._spell.several_query(asked, chat=chat)])
            opening = self._open(rng, chat=chat, introduce=rng.random() < 0.25)
            return Planted(sentences, queries, opening, chat)

        return self._document(rng, length, range(groups), plant, text_loss=text_loss)

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
        names = self._names.keys(rng, ballots or int(np.exp(rng.uniform(0, np.log(16.99)))))
        vote = len(self._spell.needle(MAJORITY, names[0], "yes", " ")) + 1
        query = self._spell.fact_query(Fact(names[0], ("yes",), MAJORITY), chat=chat, one=True)

        def plant(names: Sequence[str]) -> Planted | None:
            # At most half of the document is votes.
            most = (length // 2 - len(names) * (query.size + 4)) // (vote * len(names))
            if most < 3:
                return None
            sentences: list[list[tuple[int, ...]]] = []
            queries: list[list[Parts]] = []
            for name in names:
                low = most if margin is not None else min(most, 8)
                count = min(512, int(np.exp(rng.uniform(np.log(low), np.log(most + 0.99)))))
                lead = margin or float(np.exp(rng.uniform(np.log(0.04), 0.0)))
                right = min(count, int(count * (0.5 + lead / 2)) + 1)
                winner, loser = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
                votes = [winner] * right + [loser] * (count - right)
                sentences.append(
                    [
                        self._spell.needle(MAJORITY, name, votes[i], " ")
                        for i in rng.permutation(count).tolist()
                    ]
                )
                fact = Fact(name, (winner,), MAJORITY)
                queries.append([self._spell.fact_query(fact, chat=chat, one=True)])
            return Planted(sentences, queries, self._open(rng, chat=chat, introduce=False), chat)

        return self._document(rng, length, names, plant, text_loss=text_loss)

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
        facts = [Fact(key, (self._names.value(rng),), form) for key in self._names.keys(rng, count)]
        planted = [
            spell.needle(form, fact.key, fact.values[0], before if place else "")
            for place, fact in enumerate(facts)
        ]
        chosen = rng.permutation(len(facts))[:asked].tolist()
        questions = [self._fact_query(rng, facts[i], chat=chat) for i in chosen]
        queries = one_after_another(questions, self._spell, chat=chat)
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

        def plant(chains: Sequence[int]) -> Planted:
            sentences: list[list[tuple[int, ...]]] = []
            queries: list[list[Parts]] = []
            for number in chains:
                chain = names[number * (hops + 1) : (number + 1) * (hops + 1)]
                value = str(rng.integers(10_000, 100_000))
                sentences.append(
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
            return Planted(sentences, queries, self._open(rng, chat=chat, introduce=False), chat)

        return self._document(rng, length, range(chains), plant, text_loss=text_loss)

    def _document(
        self,
        rng: np.random.Generator,
        length: int,
        things: Sequence[Thing],
        plant: Callable[[Sequence[Thing]], Planted | None],
        *,
        text_loss: bool,
    ) -> Example:
        """A document about as many of `things`, halved as often as needed, as it has room for."""
        while things:
            planted = plant(things)
            if planted is not None:
                example = assemble(
                    rng,
                    length,
                    planted,
                    self._spell,
                    interleaved=rng.random() < self._mix.interleaved,
                    texts=self._texts,
                    text_loss=text_loss,
                )
                if example is not None:
                    return example
            things = things[: len(things) // 2]
        return self.plain(rng, length, text_loss=text_loss)

    def _open(self, rng: np.random.Generator, *, chat: bool, introduce: bool) -> Parts:
        system = ""
        if chat and rng.random() < 0.1:
            system = SYSTEM_TEXTS[rng.integers(len(SYSTEM_TEXTS))]
        return self._spell.open(chat=chat, system=system, introduce=introduce)

    def _fact_query(self, rng: np.random.Generator, fact: Fact, *, chat: bool) -> Parts:
        one = len(fact.values) == 1 and rng.random() < 0.5
        return self._spell.fact_query(fact, chat=chat, one=one)
