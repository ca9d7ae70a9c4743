"""Input and output of a decode step of a fixed size (`models.decode`, `models.graph`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.cache import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from models.config import ModelConfig

COLUMNS = 5
"""Integers of a row besides its block table."""
LIMITS = 4
"""Numbers that say how a row chooses its keys: `kernels.policy.Dynamic.limits`."""
_BESIDE = LIMITS // 2
"""Integers that take as much memory."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Size and kind of a step. Steps of fewer rows, or of shorter block tables, are padded."""

    batch: int  # rows
    pages: int  # width of the block tables
    dynamic: bool = False  # whether rows choose their keys by content, each within its own limits
    dense_layers: int = 0  # the model's first layers, which attend densely nevertheless


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A step's input, one piece of memory.

    A row of padding has length 0, slot -1, table 0 and limits 0: it writes no key, and what is
    computed for it has no meaning.
    """

    packed: Tensor  # int64 [batch * (2 + 5 + pages)]  everything below
    limits: Tensor  # float32 [batch, 4]  of each row's policy; read where the bucket is dynamic
    columns: Tensor  # int64 [5, batch]  the next three, and the rows' lengths and starts
    token_ids: Tensor  # int64 [batch]
    positions: Tensor  # int64 [batch]
    slots: Tensor  # int64 [batch]  where each row's key goes: physical page * 64 + offset
    rows: Rows  # where the keys lie, the token's own included

    @staticmethod
    def padding(
        bucket: Bucket, device: torch.device | str = "cpu", *, pinned: bool = False
    ) -> DecodeStep:
        """A step of nothing but padding; pinned memory is copied to a GPU without a wait."""
        batch, pages = bucket.batch, bucket.pages
        packed = torch.zeros(
            batch * (_BESIDE + COLUMNS + pages), dtype=torch.int64, device=device, pin_memory=pinned
        )
        sizes = [batch * numbers for numbers in (_BESIDE, COLUMNS, pages)]
        numbers, integers, tables = torch.split(packed, sizes)
        limits, columns = numbers.view(torch.float32).view(batch, LIMITS), integers.view(-1, batch)
        token_ids, positions, slots, lengths, starts = columns.unbind(0)
        slots.fill_(-1)
        rows = Rows(tables.view(batch, pages), lengths, starts)
        return DecodeStep(packed, limits, columns, token_ids, positions, slots, rows)

    def fill(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: Rows,
        limits: Tensor | None = None,
    ) -> None:
        """Take over a step of as many rows or fewer; the rest becomes padding.

        Args:
            token_ids: int64 [rows].
            positions: int64 [rows].
            slots: int64 [rows].
            rows: one a sequence, with block tables as wide or narrower.
            limits: float32 [rows or 1, 4], where the step is dynamic.
        """
        count, pages = rows.block_tables.shape
        self.packed.zero_()
        self.slots[count:] = -1
        self.token_ids[:count] = token_ids
        self.positions[:count] = positions
        self.slots[:count] = slots
        self.rows.lengths[:count] = rows.lengths
        self.rows.starts[:count] = rows.starts
        self.rows.block_tables[:count, :pages] = rows.block_tables
        if limits is not None:
            self.limits[:count] = limits


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step computed. What a host asks for is one piece of memory, and so one transfer."""

    hidden: Tensor  # [batch, hidden_size]  behind the final norm
    packed: Tensor  # float32 [Decoded.size]  everything below
    logits: Tensor  # [batch, vocab_size]
    total: Tensor  # [batch]  sum of the hidden state: no finite number where one of it is not
    # Of each layer, under a dynamic policy; None where every key is read.
    keys: Tensor | None  # [layers, batch, kv_heads]  keys read
    coverage: Tensor | None  # [layers, batch, heads]  estimated share of the mass on them

    @staticmethod
    def size(bucket: Bucket, config: ModelConfig) -> int:
        """Numbers in `packed`."""
        return bucket.batch * sum(_numbers(bucket, config))

    @staticmethod
    def over(packed: Tensor, hidden: Tensor, bucket: Bucket, config: ModelConfig) -> Decoded:
        """The result of a step whose numbers `packed` begins with, on any device."""
        batch, layers = bucket.batch, config.layers
        packed = packed[: Decoded.size(bucket, config)]
        parts = torch.split(packed, [batch * numbers for numbers in _numbers(bucket, config)])
        logits, total, keys, coverage = parts
        dynamic = bucket.dynamic
        return Decoded(
            hidden,
            packed,
            logits.view(batch, -1),
            total,
            keys.view(layers, batch, -1) if dynamic else None,
            coverage.view(layers, batch, -1) if dynamic else None,
        )


def _numbers(bucket: Bucket, config: ModelConfig) -> list[int]:
    """Numbers of a row in each part of `Decoded.packed`."""
    layers = config.layers if bucket.dynamic else 0
    return [config.vocab_size, 1, layers * config.kv_heads, layers * config.heads]
