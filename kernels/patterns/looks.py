"""What tiles of queries see of pages of keys: few different masks for many pairs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.bits import first_bits, ones
from kernels.errors import PatternError
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.expression import Expression
    from kernels.patterns.primitive import Primitive

TABLE = 1 << 22
"""Codes up to which a table may tell which occur; beyond it they are ordered."""
DENSE = 16
"""Codes for each pair of which a table tells faster which occur than an order does."""
AT_ONCE = 256
"""Masks of a primitive that are made together."""
MOST = 4096
"""Masks that are made in all, of so many tiles and pages as are looked at together."""
JOINED = 1 << 14
"""Masks of primitives that are joined together."""
WHOLE = -1
"""In place of a mask's number: the page is seen whole."""
Masks = tuple["Tensor", "Tensor"]
"""int64 [masks, 64], and int64 [pairs], which of them each pair has."""


@dataclass(frozen=True, slots=True)
class Looks:
    """What tiles see of pages, for a prompt's queries and keys.

    Attributes:
        expression: what is seen.
        causal: whether a query sees nothing behind itself.
        end: how many query positions there are, from 0 on; a tile that they end in is cut there.
        keys: how many keys there are.
    """

    expression: Expression
    causal: bool
    end: int
    keys: int

    def at(self, tile: Tensor, page: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each tile sees of a page. One mask is made for all pairs that are alike.

        Args:
            tile: int64 [pairs].
            page: int64 [pairs].

        Raises:
            PatternError: too many of them differ.

        Returns:
            The number of each pair's mask, int32 [pairs], `WHOLE` for all; how many pairs of a
            query and a key it has, int32 [pairs]; and the masks, int64 [masks, 64].
        """
        if not len(tile):
            none = tile.int()
            return none, none, tile.new_zeros(0, PAGE)
        kind, example = self.kinds(tile, page)
        if len(example) > MOST:
            raise PatternError(
                f"{len(example)} parts of this pattern's mask look different, more than {MOST}: "
                "write blocks and rows that are multiples of 64 or share large factors, or take "
                "fewer tokens"
            )
        bits, seen, whole = self._masks(tile[example], page[example])
        # Those that nobody sees, and those seen whole, need no mask.
        partial = (seen > 0) & ~whole
        number = (partial.cumsum(0) - 1).masked_fill_(~partial, WHOLE)
        return number.int().index_select(0, kind), seen.int().index_select(0, kind), bits[partial]

    def kinds(self, tile: Tensor, page: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs are alike: a number for each, from 0 on, and a pair for each number."""
        code = (page == self.keys // PAGE).long()  # keys that do not exist
        code += (tile == self.end // PAGE).long() * 2  # queries that do not
        if self.causal:
            code += ((page - tile).clamp(-1, 1) + 1) * 4
        kind, kinds = code, 12
        for primitive in self.expression.primitives:
            own = primitive.code(tile, page, self.causal)
            owns = int(own.max()) + 1
            if kinds * owns > TABLE:
                (kind, kinds), (own, owns) = _renumbered(kind, kinds), _renumbered(own, owns)
            if owns > 1:
                kind, kinds = kind * owns + own, kinds * owns
        return _examples(*_renumbered(kind, kinds))

    def _masks(self, tile: Tensor, page: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair the mask, how many pairs of query and key it has, and whether it is all.

        Where many primitives meet all pairs may differ, so that each must cost little: a mask is
        joined bit by bit from those of the primitives, which are few.
        """
        known = {one: self._masks_of(one, tile, page) for one in set(self.expression.primitives)}
        parts = torch.split(torch.arange(len(tile), device=tile.device), JOINED)
        found = [self._joined(known, tile[some], page[some], some) for some in parts]
        bits, amount, whole = map(torch.cat, zip(*found, strict=True))
        return bits, amount, whole

    def _joined(
        self, known: dict[Primitive, Masks], tile: Tensor, page: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of some pairs, by their numbers among those that primitives are known of."""

        def of(primitive: Primitive) -> Tensor:
            masks, which = known[primitive]
            return masks[which[number]]  # int64 [pairs, 64]

        query = tile[:, None] * PAGE + torch.arange(PAGE, device=tile.device)  # [pairs, 64]
        there, first = query < self.end, page[:, None] * PAGE
        keys = torch.full_like(query, self.keys) - first  # of the page's, up to where they count
        if self.causal:
            keys = torch.minimum(keys, query + 1 - first)
        bits = self.expression.joined(of) & first_bits(keys.clamp(0, PAGE).where(there, 0))
        return bits, ones(bits), ((bits == -1) | ~there).all(1)

    def _masks_of(self, one: Primitive, tile: Tensor, page: Tensor) -> Masks:
        """What a primitive's rule says: masks, int64 [masks, 64], and which of them a pair has."""
        code = one.code(tile, page, self.causal)
        if self.causal:
            code = code * 3 + (page - tile).clamp(-1, 1) + 1
        kind, example = _examples(*_renumbered(code, int(code.max()) + 1))
        place = torch.arange(PAGE, device=tile.device)
        masks = []
        for some in torch.split(example, AT_ONCE):
            query = tile[some, None, None] * PAGE + place[:, None]  # [some, 64, 1]
            key = page[some, None, None] * PAGE + place  # [some, 1, 64]
            seen = one.sees(query, key, self.causal)  # bool [some, 64, 64]
            masks.append((seen.long() << place).sum(-1))
        return torch.cat(masks), kind


def _examples(kind: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """The kinds as they are, and for each the place of one that is of it, int64 [kinds]."""
    number = torch.arange(len(kind), device=kind.device)
    return kind, kind.new_empty(kinds).scatter_(0, kind, number)


def _renumbered(code: Tensor, most: int) -> tuple[Tensor, int]:
    """The same distinctions as numbers from 0 on without gaps, and how many; there were `most`."""
    if most > TABLE or most > DENSE * len(code):
        values, number = torch.unique(code, return_inverse=True)
        return number, len(values)
    table = torch.zeros(most, dtype=torch.int64, device=code.device).scatter_(0, code, 1)
    table = table.cumsum(0)
    return table.index_select(0, code).sub_(1), int(table[-1])
