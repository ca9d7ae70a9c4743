"""Pages that rows of tiles see, each with its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.page import PAGE
from kernels.patterns.looks import WHOLE

if TYPE_CHECKING:
    from torch import Tensor


FEW = 1 << 12
"""Masks up to which equal ones are looked for. More are seldom equal, and it takes long."""


@dataclass(frozen=True, slots=True)
class Places:
    """Pages that rows see, row by row, ascending in each."""

    row: Tensor  # int32 [places]
    page: Tensor  # int32 [places]
    mask: Tensor  # int32 [places]  row of `bits`, or `WHOLE`
    seen: Tensor  # int32 [places]  pairs of a query and a key
    bits: Tensor  # int64 [masks, 64]

    @staticmethod
    def join(parts: list[Places], device: torch.device | str) -> Places:
        """The rows of all parts, one behind the other; of few masks equal ones become one."""
        none = torch.zeros(0, dtype=torch.int32, device=device)
        parts = [Places(none, none, none, none, none.long().view(0, PAGE)), *parts]
        bits = torch.cat([part.bits for part in parts])
        number = torch.arange(len(bits), device=device)
        if 0 < len(bits) <= FEW:
            bits, number = torch.unique(bits, dim=0, return_inverse=True)
        number = F.pad(number.int(), (0, 1), value=WHOLE)  # as the last it is WHOLE's, too
        masks, before = [], 0
        for part in parts:
            row = part.mask.where(part.mask == WHOLE, part.mask + before)
            masks.append(number.index_select(0, row.long() % len(number)))
            before += len(part.bits)
        return Places(
            row=torch.cat([part.row for part in parts]),
            page=torch.cat([part.page for part in parts]),
            mask=torch.cat(masks),
            seen=torch.cat([part.seen for part in parts]),
            bits=bits,
        )

    def take(self, which: Tensor) -> Places:
        """Some of the places, by number."""
        return Places(
            row=self.row.index_select(0, which),
            page=self.page.index_select(0, which),
            mask=self.mask.index_select(0, which),
            seen=self.seen.index_select(0, which),
            bits=self.bits,
        )
