"""Fixed patterns: which keys a query sees by position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.patterns import complexity, parse
from kernels.patterns.expression import Intersection, Union
from kernels.patterns.lists import compile_lists
from kernels.patterns.view import FOREVER, View
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.expression import Expression
    from kernels.patterns.primitive import Primitive
    from kernels.tiles import TileSelection


@dataclass(frozen=True, slots=True)
class Pattern:
    """An expression of primitives, written `"global:1+window:512@bidirectional"`.

    `+` is union and `&` intersection, which binds tighter; parentheses may group. Everything is
    derived from one definition, `allows`: masks, the keys of decode rows, the pages of tiles, and
    how many pairs there are. A causal pattern shows a query no key behind it.
    """

    expression: Expression
    causal: bool = True

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern, or the name of a preset.

        Raises:
            PatternError: naming the character that is wrong and what to write there.
        """
        return Pattern(*parse.parse(text))

    @staticmethod
    def parse_causal(text: str) -> Pattern:
        """Read a pattern for a model whose tokens see only what is before them.

        Raises:
            PatternError: it does not parse, or is bidirectional.
        """
        pattern = Pattern.parse(text)
        if not pattern.causal:
            raise PatternError(
                f"the pattern {text} is bidirectional, but this model's tokens see only what is "
                f"before them: write {pattern.expression}",
                position=max(0, text.find("@")),
            )
        return pattern

    def __str__(self) -> str:
        return f"{self.expression}{'' if self.causal else '@bidirectional'}"

    def __add__(self, other: Pattern) -> Pattern:
        """The union: what either allows. Both are causal, or both are not."""
        return Pattern(Union((self.expression, other.expression)), self._causal_with(other))

    def __and__(self, other: Pattern) -> Pattern:
        """The intersection: what both allow. Both are causal, or both are not."""
        return Pattern(Intersection((self.expression, other.expression)), self._causal_with(other))

    def _causal_with(self, other: Pattern) -> bool:
        if self.causal is not other.causal:
            raise PatternError(f"{self} and {other}: one is causal and one bidirectional")
        return self.causal

    @property
    def primitives(self) -> tuple[Primitive, ...]:
        """Its primitives, from left to right."""
        return self.expression.primitives

    @property
    def keeps_previous(self) -> bool:
        """Whether every query sees the key before it, without which induction heads break.

        However long the prompt is: `block_local:8` does not, for a block's first query.
        """
        return self.expression.keeps_previous

    @property
    def complexity(self) -> str:
        """How the number of pairs grows with that of tokens, "O(n w)"; see `complexity`."""
        return complexity.of(self.expression)

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` may see `key`: bool, broadcast over int64 positions from 0."""
        return self.expression.allows(query, key, self.causal)

    def mask(self, queries: int, keys: int, first: int = 0) -> Tensor:
        """bool [queries, keys], what the queries from position `first` on see; to look at."""
        query = torch.arange(first, first + queries)
        return self.allows(query[:, None], torch.arange(keys))

    def select(self, lengths: Tensor, starts: Tensor, kv_heads: int) -> Selection:
        """The selection of decode rows; all KV heads share it.

        Args:
            lengths: int64 [rows], end of the visible keys; the query is the key before it.
            starts: int64 [rows], first visible key.
            kv_heads: number of KV heads.
        """
        query = lengths[:, None] - 1  # [rows, 1]
        earliest, latest, span = torch.stack(
            (lengths.amin() - 1, lengths.amax() - 1, (lengths - starts).amax())
        ).tolist()
        view = View(
            first=query,
            low=starts[:, None],
            high=query,
            size=1,
            span=max(span, 0),
            earliest=earliest,
            latest=latest,
            causal=self.causal,
        )
        cover = self.expression.cover(view)
        if cover.columns >= view.span:  # not more than there are, whatever the pattern
            keys = view.low + torch.arange(view.span, device=query.device)  # [rows, span]
            seen = (keys <= query) & self.allows(query, keys)
        else:
            keys = cover.units()  # [rows, columns]
            seen = (keys < FOREVER) & self.allows(query, keys)
            if len(cover.pieces) > 1:
                keys = keys.masked_fill(~seen, FOREVER).sort(dim=1).values
                seen = keys < FOREVER
                seen[:, 1:] &= keys[:, 1:] != keys[:, :-1]  # what two primitives see counts once
        one = Selection.from_mask(seen[:, None], keys[:, None])
        return Selection(one.indices.expand(-1, kv_heads, -1), one.counts.expand(-1, kv_heads))

    def tiles(
        self, first: int, queries: int, keys: int, device: torch.device | str, kv_heads: int = 1
    ) -> TileSelection:
        """The pages that tiles of a prompt attend to; all KV heads share the lists.

        Args:
            first: position of the first query, a multiple of 64.
            queries: how many; those that the last tile lacks see nothing.
            keys: how many keys there are, from position 0 on.
            device: where the lists are made.
            kv_heads: number of KV heads.

        Raises:
            PatternError: `first` is no multiple of 64, or too many pages would have to be looked
                at.
        """
        lists = compile_lists(self.expression, self.causal, first, queries, keys, device)
        return lists.selection(kv_heads)

    def selected_keys(self, tokens: int) -> int:
        """How many (query, key) pairs it allows among so many tokens.

        Raises:
            PatternError: as `keys_of_tiles` does.
        """
        return int(self.keys_of_tiles(tokens).sum())

    def keys_of_tiles(self, tokens: int) -> Tensor:
        """How many (query, key) pairs it allows for each 64 queries of so many, int64 [tiles].

        What the distance alone decides is counted by distance; all else from the tiles' lists
        before they are laid out, in about the time of `tiles` and less memory.

        Raises:
            PatternError: too many different pages would have to be looked at.
        """
        if all(primitive.by_distance for primitive in self.primitives):
            return self._keys_by_distance(tokens)
        return compile_lists(self.expression, self.causal, 0, tokens, tokens, "cpu").pairs

    def sparsity(self, tokens: int) -> float:
        """Share of the pairs that dense attention would read, and this does not; 0 to 1."""
        visible = tokens * (tokens + 1) // 2 if self.causal else tokens * tokens
        return 1 - self.selected_keys(tokens) / visible if visible else 0.0

    def _keys_by_distance(self, tokens: int) -> Tensor:
        """`keys_of_tiles` where q - k alone decides."""
        place, end = torch.arange(tokens), torch.tensor(max(tokens - 1, 0))
        each = self.allows(end, place).flip(0).cumsum(0)  # int64 [tokens], of each query
        if not self.causal and tokens:
            later = self.allows(torch.tensor(0), place)
            later[0] = False  # its own key has been counted
            each = each + later.cumsum(0).flip(0)
        tiles = -(-tokens // PAGE)
        return F.pad(each, (0, tiles * PAGE - tokens)).view(tiles, PAGE).sum(1)
