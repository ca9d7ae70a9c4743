"""Where running text comes from: files of the user's own, or generated prose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.training.filler import prose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

_SENTENCE = re.compile(r'(?<=[.!?"”])(?=\s)')


@dataclass(frozen=True, slots=True)
class Source:
    """Running text.

    Attributes:
        encode: token ids of a text, without special tokens.
        texts: texts of the user's own; generated prose where there are none.
    """

    encode: Callable[[str], Sequence[int]]
    texts: tuple[str, ...] = ()

    def sentences(self, rng: np.random.Generator, tokens: int) -> list[str]:
        """Consecutive sentences of at most `tokens` tokens in all, from a random place."""
        if self.texts:
            text = self.texts[int(rng.integers(len(self.texts)))]
            # No tokenizer makes fewer than one token of sixteen characters of prose.
            start = int(rng.integers(max(1, len(text) - 16 * tokens)))
            text = text[start : start + 16 * tokens].partition(" ")[2]
        else:
            text = prose(int(rng.integers(2**31)), 8 * tokens, held_out=True)
        kept: list[str] = []
        for piece in _SENTENCE.split(text):
            tokens -= len(self.encode(piece))
            if tokens < 0:
                break
            kept.append(piece)
        return kept

    def long_text(self, rng: np.random.Generator, tokens: int) -> list[Sequence[int]]:
        """Consecutive sentences, as tokens, of at least `tokens` tokens in all.

        Fewer, where no text of the user's own is that long: then the longest, whole.
        """
        if self.texts:
            # Prose has four or five characters a token.
            long = [text for text in self.texts if len(text) >= 8 * tokens]
            if long:
                text = long[int(rng.integers(len(long)))]
                start = int(rng.integers(max(1, len(text) - 16 * tokens)))
                text = text[start : start + 16 * tokens].partition(" ")[2]
            else:
                text = max(self.texts, key=len)
        else:
            text = prose(int(rng.integers(2**31)), 8 * tokens, held_out=True)
        return [self.encode(piece) for piece in _SENTENCE.split(text)]
