"""Documents: running text with sentences planted in it and questions asked about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.training.pieces import NONE, TEXT, Example, Parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.training.corpus import Corpus
    from models.training.pieces import Speller


@dataclass(frozen=True, slots=True)
class Planted:
    """What goes into a document.

    Attributes:
        sentences: of each fact, in their order.
        queries: about each fact; facts beyond them are distractors.
        opening: where the document begins.
        chat: whether questions are turns of a chat.
    """

    sentences: list[list[tuple[int, ...]]]
    queries: list[list[Parts]]
    opening: Parts
    chat: bool


@dataclass(frozen=True, slots=True)
class Texts:
    """Running text, and generated text that takes its place in a share of the documents."""

    text: Corpus
    generated: Corpus
    share: float

    def draw(self, rng: np.random.Generator, size: int) -> tuple[Corpus, int, int]:
        """A corpus and a range of at most `size` tokens in it that starts with a paragraph."""
        corpus = self.generated if rng.random() < self.share else self.text
        last = int(np.searchsorted(corpus.paragraphs, len(corpus.tokens) - size, side="right"))
        start = int(corpus.paragraphs[rng.integers(max(1, last))])
        return corpus, start, min(start + size, len(corpus.tokens))


def assemble(
    rng: np.random.Generator,
    length: int,
    planted: Planted,
    spell: Speller,
    *,
    interleaved: bool,
    texts: Texts,
    text_loss: bool,
) -> Example | None:
    """Spreads planted sentences over a text and asks the questions.

    Args:
        rng: draws the places.
        length: tokens.
        planted: what to spread; its opening grows into the sequence.
        spell: spells what stands between a text and a question.
        interleaved: whether questions come in the middle of the text, or behind it.
        texts: what to spread it over.
        text_loss: whether the running text carries loss.

    Returns:
        The sequence, or None when too little room is left for text.
    """
    parts, chat = planted.opening, planted.chat
    turn = spell.lead(chat=chat, after_query=True)
    size = length - parts.size - sum(len(s) for sentences in planted.sentences for s in sentences)
    size -= sum(query.size + 2 * len(turn) for block in planted.queries for query in block)
    if size < max(48, length // 8):
        return None
    corpus, start, stop = texts.draw(rng, size)
    places = places_in(corpus, start, stop)  # [places] positions in the corpus
    if len(places) < 2:
        return None
    last = len(places) - 1
    stop = stop if interleaved else int(places[last])
    events: list[tuple[int, float, tuple[int, ...] | Parts]] = []
    for fact, sentences in enumerate(planted.sentences):
        # Depths are uniform over the document; a sentence goes to the next place for one.
        depths = start + np.sort(rng.random(len(sentences))) * (stop - start)
        at = np.minimum(np.searchsorted(places, depths), last)
        ties = np.sort(rng.random(len(sentences)))
        for place, tie, sentence in zip(at, ties, sentences, strict=True):
            events.append((int(places[place]), float(tie), sentence))
        if fact < len(planted.queries):
            ask = int(rng.integers(int(at[-1]), len(places))) if interleaved else last
            tie_after = 1.0 + rng.random()
            for number, query in enumerate(planted.queries[fact]):
                events.append((int(places[ask]), tie_after + 1e-6 * number, query))
    events.sort(key=lambda event: event[:2])

    kind = TEXT if text_loss else NONE
    position = start
    after_query = False
    for place, _, event in events:
        if place > position:
            if after_query:
                # The turn ends with the newlines that the text would go on with.
                while position < place and int(corpus.tokens[position]) in spell.newlines:
                    position += 1
                parts.add(turn, NONE)
                after_query = False
            # The token after something planted cannot be foreseen.
            blind = position + (1 if position > start else 0)
            parts.add(corpus.tokens[position:blind], NONE)
            parts.add(corpus.tokens[blind:place], kind)
            position = place
        if isinstance(event, Parts):
            parts.add(spell.lead(chat=chat, after_query=after_query), NONE)
            parts.extend(event)
            after_query = True
        else:
            parts.add(event, NONE)
    if after_query and position < stop:
        while position < stop and int(corpus.tokens[position]) in spell.newlines:
            position += 1
        parts.add(turn, NONE)
        parts.add(corpus.tokens[position : position + 1], NONE)
        position += 1
    parts.add(corpus.tokens[position:stop], kind)
    return parts.finish(length)


def one_after_another(queries: Sequence[Parts], spell: Speller, *, chat: bool) -> Parts:
    """Questions with nothing but turns between them."""
    parts = Parts()
    for place, query in enumerate(queries):
        if place:
            parts.add(spell.lead(chat=chat, after_query=True), NONE)
        parts.extend(query)
    return parts


def places_in(corpus: Corpus, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Positions inside the range where a sentence may be inserted: int64 [places], sorted."""
    first, last = np.searchsorted(corpus.sentences, (start + 1, stop), side="left")
    return np.asarray(corpus.sentences[first:last])
