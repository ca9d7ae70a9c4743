"""Where to look: the one value that selectors produce and attention consumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """The keys each query row attends to, shared by the query heads of a KV head.

    Positions are logical: the block table and the causal edge belong to the attention op. A row
    may be empty. Duplicates are forbidden; positions ascend, so sums have one order.

    A key of a sample stands for others too (`kernels.sample`): its mass counts so many times.
    """

    indices: Tensor  # int64 [rows, kv_heads, capacity]  packed left, padded with -1
    counts: Tensor  # int64 [rows, kv_heads]  0 <= count <= capacity
    log_weight: Tensor | None = (
        None  # float32 [rows, kv_heads, capacity]  log of how many, 0 behind
    )

    @staticmethod
    def from_mask(mask: Tensor, positions: Tensor, log_weight: Tensor | None = None) -> Selection:
        """Pack the chosen keys to the left.

        Args:
            mask: bool [rows, kv_heads, keys], True where the key is chosen.
            positions: int64, broadcast to the mask's shape, ascending logical positions.
            log_weight: [rows, kv_heads, keys], where keys stand for others.
        """
        counts = mask.sum(-1)  # [rows, kv_heads]
        capacity = int(counts.max()) if counts.numel() else 0
        # By three indices, so that broadcast positions are never laid out. Row by row, ascending:
        # the order in which the packed places are filled below.
        chosen = positions.expand(mask.shape)[mask.nonzero(as_tuple=True)]  # [chosen]
        packed = torch.arange(capacity, device=mask.device) < counts[..., None]
        indices = counts.new_full(packed.shape, -1).masked_scatter_(packed, chosen)
        if log_weight is None:
            return Selection(indices, counts)
        weights = log_weight.new_zeros(packed.shape).masked_scatter_(packed, log_weight[mask])
        return Selection(indices, counts, weights)

    @staticmethod
    def join(parts: list[Selection]) -> Selection:
        """The selections of rows that follow each other; weights have all of them or none."""
        if len(parts) == 1:
            return parts[0]
        capacity = max(part.indices.shape[2] for part in parts)

        def padded(tensors: list[Tensor], value: int) -> Tensor:
            ends = [capacity - one.shape[2] for one in tensors]
            whole = (F.pad(x, (0, n), value=value) for x, n in zip(tensors, ends, strict=True))
            return torch.cat(list(whole))

        weights = [part.log_weight for part in parts if part.log_weight is not None]
        return Selection(
            padded([part.indices for part in parts], -1),
            torch.cat([part.counts for part in parts]),
            padded(weights, 0) if weights else None,
        )

    @staticmethod
    def of_heads(parts: Sequence[Selection], order: Sequence[int]) -> Selection:
        """The selection of KV heads that do not share one.

        Args:
            parts: of one KV head each, of the same rows, without weights.
            order: of each KV head, the part that is its own.
        """
        capacity = max(part.indices.shape[2] for part in parts)
        padded = [F.pad(x.indices, (0, capacity - x.indices.shape[2]), value=-1) for x in parts]
        indices = torch.cat(padded, dim=1)[:, list(order)]
        return Selection(indices, torch.cat([x.counts for x in parts], dim=1)[:, list(order)])

    def rows(self, part: slice) -> Selection:
        """The selection of some rows."""
        weights = None if self.log_weight is None else self.log_weight[part]
        return Selection(self.indices[part], self.counts[part], weights)

    def validate(self, lengths: Tensor) -> None:
        """Check every promise of this class; it waits for the device, so it is for tests.

        Args:
            lengths: int64 [rows], the number of keys each row may see.

        Raises:
            KernelError: naming the first promise that does not hold.
        """
        capacity = self.indices.shape[-1]
        place = torch.arange(capacity, device=self.indices.device)
        packed = place < self.counts[..., None]  # [rows, kv_heads, capacity]
        if bool(((self.counts < 0) | (self.counts > capacity)).any()):
            raise KernelError("a selection's count lies outside 0 to its capacity")
        if bool((self.indices[~packed] != -1).any()):
            raise KernelError("a selection is not padded with -1 behind its count")
        if bool((packed & ((self.indices < 0) | (self.indices >= lengths[:, None, None]))).any()):
            raise KernelError("a selection holds a position that its row cannot see")
        step = self.indices[..., 1:] - self.indices[..., :-1]
        if bool((packed[..., 1:] & (step <= 0)).any()):
            raise KernelError("a selection's positions do not ascend")
        weights = self.log_weight
        if weights is not None and bool(((weights < 0) | ((weights > 0) & ~packed)).any()):
            raise KernelError("a selection's key stands for less than itself, or for none")


def unselected(taken: Tensor, width: int, start: Tensor | int) -> Tensor:
    """Which of the `width` positions from `start` on are not among `taken`.

    Args:
        taken: int64 [rows, kv_heads, capacity], -1 where there is none.
        width: how many positions.
        start: int64 [rows, 1, 1], or one for all rows.

    Returns:
        bool [rows, kv_heads, width].
    """
    column = taken - start
    column = torch.where((taken >= 0) & (column >= 0) & (column < width), column, width)
    # One column more takes the writes of what lies elsewhere.
    left = torch.ones(*taken.shape[:2], width + 1, dtype=torch.bool, device=taken.device)
    return left.scatter_(2, column, False)[..., :-1]
