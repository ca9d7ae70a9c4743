"""Keys and values of planted facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.training import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


class Names:
    """Draws keys of `adjective-noun` form and numbers.

    With `held_out` they are an evaluation's: words that training never uses, and seven digits.
    """

    def __init__(self, text_words: Sequence[str], *, held_out: bool) -> None:
        self._held_out = held_out
        self._adjectives = words.HELD_OUT_ADJECTIVES if held_out else words.TRAIN_ADJECTIVES
        self._nouns = words.HELD_OUT_NOUNS if held_out else words.TRAIN_NOUNS
        banned = {*words.HELD_OUT_ADJECTIVES, *words.HELD_OUT_NOUNS}
        self._text_words = tuple(word for word in text_words if word not in banned)

    def keys(self, rng: np.random.Generator, count: int) -> list[str]:
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

    def value(self, rng: np.random.Generator) -> str:
        """A number that does not start with zero."""
        digits = 7 if self._held_out or rng.random() < 0.8 else int(rng.integers(4, 11))
        return str(rng.integers(10 ** (digits - 1), 10**digits))

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
