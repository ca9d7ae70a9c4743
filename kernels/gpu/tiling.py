"""How tiles of queries are shared among programs: a row is a query and a head of the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 128
"""Of a program; half as many where a head is wide."""
WIDE = 128
"""Channels beyond which it is."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Programs that share a tile, for one KV head."""

    group: int
    padded: int  # rows of a query: the group's heads, up to a power of two
    rows: int  # of a program
    units: int  # programs of a tile
    head_dim: int
    small: bool  # two programs share a multiprocessor

    @staticmethod
    def of(query: Tensor, kv_heads: int, every: int = 1) -> Tiling:
        """Of queries [tokens, heads, head_dim], where of `every` on end the last one has rows."""
        _, heads, head_dim = query.shape
        padded = int(triton.next_power_of_2(heads // kv_heads))
        lines = PAGE // every * padded
        rows = min(ROWS if head_dim <= WIDE else ROWS // 2, lines)
        small = rows == ROWS and query.itemsize == 2
        return Tiling(heads // kv_heads, padded, rows, lines // rows, head_dim, small)

    @property
    def width(self) -> int:
        """Channels, up to a power of two."""
        return int(triton.next_power_of_2(self.head_dim))

    @property
    def launch(self) -> dict[str, int | None]:
        """What a kernel of these programs is compiled with."""
        return {
            "GROUP": self.group,
            "PADDED": self.padded,
            "ROWS": self.rows,
            "DIM": self.head_dim,
            "WIDTH": self.width,
            "PAGE": PAGE,
            "num_warps": self.rows // 16,
            "num_stages": 2,
            "maxnreg": 128 if self.small else None,
        }


@triton.jit
def rows_at(
    unit, kv_head, kv_heads, start, tokens,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """Of a program's rows: numbers in the tile, which are there, places; and the tile's number.

    Of `EVERY` queries on end the last one has rows.
    """
    units: tl.constexpr = PAGE // EVERY * PADDED // ROWS
    row, tile = tl.arange(0, ROWS), unit // units
    number = (unit % units * (ROWS // PADDED) + row // PADDED) * EVERY + (EVERY - 1)
    token = start // PAGE * PAGE + tile * PAGE + number - start
    there = (token >= 0) & (token < tokens) & (row % PADDED < GROUP)
    line = (token * kv_heads + kv_head).to(tl.int64) * GROUP + row % PADDED
    return number, there, line, tile
