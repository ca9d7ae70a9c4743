"""The texts of one forward pass, one behind the other and without padding between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.page import PAGE
from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a text decides who sees whom; equal shapes share their lists of pages.

    Attributes:
        tokens: how many there are.
        padded: to how many the text was filled up; BigBird's last block is the last one of these.
        spans: the stretches of tokens that are no padding, begin and end; () for all of them.
        global_tokens: places of Longformer's global tokens, ascending.
    """

    tokens: int
    padded: int
    spans: tuple[tuple[int, int], ...] = ()
    global_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """One text: its tokens with the special ones, and their types."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    shape: Shape

    @staticmethod
    def of(
        ids: Sequence[int],
        *,
        types: Sequence[int] | None = None,
        global_tokens: Sequence[int] = (),
    ) -> Text:
        """A text without padding.

        Args:
            ids: its tokens.
            types: 0 or 1 for each token, which of two texts it belongs to; None for 0.
            global_tokens: places of the tokens that see all and that all see (Longformer).

        Raises:
            ModelError: it is empty, or the types or places do not fit to it.
        """
        count = len(ids)
        if not count:
            raise ModelError("A text must have at least one token.")
        if types is not None and len(types) != count:
            raise ModelError(f"A text of {count} tokens needs {count} types, not {len(types)}.")
        if any(not 0 <= place < count for place in global_tokens):
            raise ModelError(f"Global tokens must lie in 0 to {count - 1}, the text's tokens.")
        places = tuple(sorted(set(global_tokens)))
        kinds = tuple(types) if types is not None else (0,) * count
        return Text(tuple(ids), kinds, Shape(count, count, (), places))

    @staticmethod
    def of_padded(
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        types: Tensor | None = None,
        global_mask: Tensor | None = None,
    ) -> list[Text]:
        """Texts of a batch that was filled up to one length, as transformers takes it.

        What fills a text up at its end is left out, and what stands elsewhere is never seen.

        Args:
            ids: int64 [texts, tokens].
            mask: [texts, tokens], 0 for padding; None: there is none.
            types: int64 [texts, tokens]; None for 0.
            global_mask: [texts, tokens], 1 for global tokens; None for none.

        Raises:
            ModelError: a text is nothing but padding.
        """
        texts = []
        for row in range(len(ids)):
            there = torch.ones_like(ids[row]) if mask is None else mask[row]
            places = there.nonzero()[:, 0].tolist()
            if not places:
                raise ModelError(f"Text {row} of the batch is nothing but padding.")
            count = places[-1] + 1
            chosen = []
            if global_mask is not None:
                chosen = (global_mask[row] * there).nonzero()[:, 0].tolist()
            kinds = [0] * count if types is None else types[row, :count].tolist()
            spans = () if len(places) == count else _spans(places)
            shape = Shape(count, ids.shape[1], spans, tuple(chosen))
            texts.append(Text(tuple(ids[row, :count].tolist()), tuple(kinds), shape))
        return texts


@dataclass(frozen=True, slots=True)
class Packed:
    """Texts on a device."""

    texts: tuple[Text, ...]
    ids: Tensor  # int64 [tokens]
    types: Tensor  # int64 [tokens]
    begins: tuple[int, ...]  # [texts]  where each begins among the tokens
    pages: tuple[int, ...]  # [texts]  first page of each in the cache

    @staticmethod
    def of(texts: Sequence[Text], device: torch.device) -> Packed:
        """Lay texts one behind the other."""
        begins, pages, token, page = [], [], 0, 0
        for text in texts:
            begins.append(token)
            pages.append(page)
            token, page = token + len(text.ids), page - -len(text.ids) // PAGE
        ids = torch.tensor([token for text in texts for token in text.ids], device=device)
        types = torch.tensor([kind for text in texts for kind in text.types], device=device)
        return Packed(tuple(texts), ids, types, tuple(begins), tuple(pages))

    @property
    def room(self) -> int:
        """Pages that the texts take in a cache."""
        return sum(-(-len(text.ids) // PAGE) for text in self.texts)

    def slices(self) -> list[slice]:
        """The tokens of each text."""
        return [
            slice(begin, begin + len(text.ids))
            for begin, text in zip(self.begins, self.texts, strict=True)
        ]


def _spans(places: list[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for place in places:
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return tuple(spans)
