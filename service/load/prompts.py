"""Prompts of a given number of tokens, made up here: no data set, no model hub.

There are three ways. `TokenIds` sends random ids, exact in length, to servers that complete ids.
`FittedWords` writes words and counts them with a tokenizer's folder: exact wherever that is the
server's. `Words` counts a word as a token, for chats without a tokenizer; the answers' usage says
how many tokens they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from models.training.filler import prose
from service.errors import ConfigError
from service.load.trace import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.tokenizer import Tokenizer
    from service.load.plan import Planned

DEFAULT_IDS = range(300, 1300)
"""Ordinary tokens in the vocabularies that Saccade's architectures have; special ones lie below
or far above."""
_VOCABULARY_SEED = 20_000
"""Characters of text from which the words come."""
_TRIES = 8


class Prompts(Protocol):
    """Makes the prompts of one kind."""

    def make(self, planned: Planned) -> str | list[int]:
        """A text or token ids."""


class TokenIds:
    """Random token ids.

    Args:
        ids: to draw from.
        seed: of shared prefixes.
    """

    def __init__(self, ids: range, seed: int) -> None:
        self._ids = ids
        self._seed = seed

    def make(self, planned: Planned) -> list[int]:
        """Exactly `prompt_tokens` ids; equal prefixes and blocks hold equal ones."""
        tokens: list[int] = []
        for seed, count in _parts(planned, self._seed):
            rng = np.random.default_rng(seed)
            tokens += rng.integers(self._ids.start, self._ids.stop, count).tolist()
        return tokens


class Words:
    """As many words as there should be tokens."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._words = _vocabulary()

    def make(self, planned: Planned) -> str:
        """A text of `prompt_tokens` words."""
        return "".join(_spelt(planned, self._seed, self._words))


class FittedWords:
    """Words that are `prompt_tokens` tokens together.

    Args:
        tokenizer: the server's.
        seed: of shared prefixes.
        special: whether the server puts special tokens in front, which are then counted.

    Raises:
        ConfigError: hardly a word is one token, so that lengths could not be met.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, *, special: bool) -> None:
        self._count: Callable[[str], int] = lambda text: len(
            tokenizer.encode(text, add_special_tokens=special)
        )
        self._seed = seed
        empty = self._count("")
        self._words = [word for word in _vocabulary() if self._count(word) == empty + 1]
        self._overhead = empty
        if len(self._words) < 16:
            raise ConfigError(
                "the tokenizer has hardly a word as one token, so prompts of words cannot be "
                "counted; leave --tokenizer out to send token ids"
            )

    def make(self, planned: Planned) -> str:
        """A text; one token more or fewer where words and special tokens do not add up."""
        words = _spelt(planned, self._seed, self._words)
        words = words[: max(1, len(words) - self._overhead)]
        rng = np.random.default_rng([planned.seed, 1])
        for _ in range(_TRIES):
            over = self._count("".join(words)) - planned.prompt_tokens
            if over == 0 or (over > 0 and len(words) <= over):
                break
            if over > 0:
                del words[-over:]
            else:
                words += [self._words[i] for i in rng.integers(0, len(self._words), -over)]
        return "".join(words)


def _parts(planned: Planned, seed: int) -> list[tuple[list[int], int]]:
    """Seeds and lengths of a prompt's pieces: shared ones first, then its own."""
    parts, left = [], planned.prompt_tokens
    for block in planned.blocks:
        count = min(BLOCK, left)
        parts.append(([seed, 2, block % 2**63], count))
        left -= count
    if planned.prefix_tokens and not planned.blocks:
        parts.append(([seed, 3, planned.group], planned.prefix_tokens))
        left -= planned.prefix_tokens
    parts.append(([planned.seed], left))
    return parts


def _spelt(planned: Planned, seed: int, words: list[str]) -> list[str]:
    """A word a token, each with its space in front."""
    spelt: list[str] = []
    for part, count in _parts(planned, seed):
        rng = np.random.default_rng(part)
        spelt += [words[i] for i in rng.integers(0, len(words), count)]
    return spelt


def _vocabulary() -> list[str]:
    """Plain words, each with a space in front."""
    text = prose(0, _VOCABULARY_SEED)
    return sorted({f" {word}" for word in text.split() if word.isascii() and word.isalpha()})
