"""A part of a pattern's mask, to look at: cells of one pair or of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.patterns.lit import lit
from kernels.patterns.looks import Looks

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.pattern import Pattern

MASKS = 4096
"""Different masks of a tile and a page that are made for one picture."""
AT_ONCE = 64
"""Of these are made together."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A part of a mask; a cell holds the pairs of `step` queries and as many keys.

    Of several primitives that let a query see a key the leftmost counts as the one that does.
    """

    step: int
    primitive: Tensor  # int64 [rows, columns]  that most of a cell's pairs are seen by; -1: none
    share: Tensor  # float32 [rows, columns]  pairs seen over pairs that there are
    lit: Tensor  # int64 [rows, columns]  bit p: some pair is seen by primitive p


def picture(
    pattern: Pattern, rows: tuple[int, int], columns: tuple[int, int], length: int, step: int
) -> Picture:
    """What queries of `rows` see of keys of `columns`, first and last behind, among `length`.

    One mask is made for all tiles and pages that are alike.

    Args:
        pattern: the pattern.
        rows: begin at a multiple of `step`, and end among the tokens, but for the last cell's.
        columns: likewise.
        length: how many tokens there are.
        step: a power of two, 64 at most.

    Raises:
        PatternError: too many tiles and pages differ.
    """
    tile = torch.arange(rows[0] // PAGE, -(-rows[1] // PAGE))
    page = torch.arange(columns[0] // PAGE, -(-columns[1] // PAGE))
    looks = Looks(pattern.expression, pattern.causal, length, length)
    tiles = tile.repeat_interleave(len(page))
    pages = page.repeat(len(tile))
    kind, example = looks.kinds(tiles, pages)
    if len(example) > MASKS:
        raise PatternError(
            f"{len(example)} parts of this mask look different, more than the {MASKS} that are "
            "drawn at once: look at a smaller part of it"
        )
    parts = [
        _cells(pattern, tiles[some], pages[some], length, step)
        for some in torch.split(example, AT_ONCE)
    ]
    found = []
    for which in range(3):
        of_kinds = torch.cat([part[which] for part in parts])  # [kinds, side, side]
        side = of_kinds.shape[1]
        laid = of_kinds[kind].view(len(tile), len(page), side, side).transpose(1, 2)
        laid = laid.reshape(len(tile) * side, -1)
        top, left = (rows[0] % PAGE) // step, (columns[0] % PAGE) // step
        height, width = -(-(rows[1] - rows[0]) // step), -(-(columns[1] - columns[0]) // step)
        found.append(laid[top : top + height, left : left + width])
    primitive, seen, bits = found
    there = _pairs(pattern.causal, rows, columns, length, step)
    share = seen / there.clamp_min(1)
    return Picture(step, primitive, share.float(), bits)


def _cells(
    pattern: Pattern, tile: Tensor, page: Tensor, length: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of tiles and pages [n] what cells hold: primitive, pairs seen and bits, [n, side, side]."""
    place, side = torch.arange(PAGE), PAGE // step
    query = tile[:, None, None] * PAGE + place[:, None]  # [n, 64, 1]
    key = page[:, None, None] * PAGE + place  # [n, 1, 64]
    bits = lit(pattern.expression, query, key, pattern.causal)  # [n, 64, 64]
    bits = bits.masked_fill((query >= length) | (key >= length), 0)
    leftmost = bits & -bits

    def counted(chosen: Tensor) -> Tensor:
        return chosen.reshape(-1, side, step, side, step).sum((2, 4))

    total = torch.zeros(len(tile), side, side, dtype=torch.int64)
    some, owner, most = total.clone(), total - 1, total.clone()
    for number in range(len(pattern.primitives)):
        pairs = counted(leftmost == 1 << number)  # int64 [n, side, side]
        some |= (counted(bits >> number & 1) > 0).long() << number
        owner.masked_fill_(pairs > most, number)
        most, total = torch.maximum(pairs, most), total + pairs
    return owner, total, some


def _pairs(
    causal: bool, rows: tuple[int, int], columns: tuple[int, int], length: int, step: int
) -> Tensor:
    """How many pairs of a query and a key that it may see a cell has, int64 [rows, columns]."""
    first = torch.arange(*rows, step)[:, None]
    key = torch.arange(*columns, step)
    wide = (length - key).clamp(0, step)  # keys that are there
    total = torch.zeros(len(first), len(key), dtype=torch.int64)
    for query in range(step):
        at = first + query
        seen = torch.minimum(at + 1 - key, wide).clamp_min(0) if causal else wide
        total += seen * (at < length)
    return total
