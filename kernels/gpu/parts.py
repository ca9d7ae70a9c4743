"""Attention over parts of the keys, one a program, and how the parts are joined.

Each counts by the mass that its log-sum-exp tells (FlashDecoding; Dao et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu import overlap
from kernels.gpu.softmax import finite, lse_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """Attention over each split of the keys. A single one is written as it will be read."""

    outputs: Tensor  # [rows, heads, splits, head_dim]  float32; of one split, the query's dtype
    lses: Tensor  # float32 [rows, heads, splits]
    owns: Tensor  # likewise, without weights; the same tensor where there are none

    @staticmethod
    def of(query: Tensor, splits: int, *, weighted: bool) -> Parts:
        """Memory for the parts of a query's attention."""
        count, heads, head_dim = query.shape
        wide = query.dtype if splits == 1 else torch.float32
        outputs = query.new_empty(count, heads, splits, head_dim, dtype=wide)
        lses = query.new_empty(count, heads, splits, dtype=torch.float32)
        return Parts(outputs, lses, torch.empty_like(lses) if weighted else lses)

    def joined(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, heads, head_dim], and the log-sum-exps with weights and without: [rows, heads]."""
        count, heads, splits, head_dim = self.outputs.shape
        if splits == 1:
            return self.outputs[:, :, 0], self.lses[:, :, 0], self.owns[:, :, 0]
        weighted = self.owns is not self.lses
        output = torch.empty(count, heads, head_dim, dtype=dtype, device=self.lses.device)
        lse = self.lses.new_empty(count, heads)
        own = torch.empty_like(lse) if weighted else lse
        overlaps = overlap.possible(lse.device)
        join_parts[count, heads](
            self.outputs, self.lses, self.owns, output, lse, own, splits,
            SPLITS=triton.next_power_of_2(splits), DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim), WEIGHTED=weighted, OVERLAP=overlaps,
            launch_pdl=overlaps, num_warps=4,
        )  # fmt: skip
        return output, lse, own


@triton.jit
def leave(
    outputs, lses, target, channel, wide, there, peak, total, sums, DIM: tl.constexpr
):  # fmt: skip
    """Writes one part."""
    output = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lses + target, lse_of(peak, total), there)
    place = outputs + target[:, None] * DIM + channel[None]
    tl.store(place, output.to(outputs.dtype.element_ty), wide)


@triton.jit(do_not_specialize=["splits"])
def join_parts(
    outputs, lses, owns, output, lse, own, splits,
    SPLITS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head, weighted with their masses."""
    overlap.begin(OVERLAP)
    overlap.wait(OVERLAP)
    line = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    part = tl.load(lses + line * splits + split, split < splits, float("-inf"))
    peak = finite(tl.max(part, 0))
    mass = tl.exp(part - peak)
    total = tl.sum(mass, 0)
    data = tl.load(
        outputs + (line * splits + split[:, None]) * DIM + channel[None],
        (split < splits)[:, None] & (channel < DIM)[None],
        0.0,
    )  # [SPLITS, WIDTH]
    mean = tl.sum(data * mass[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + line * DIM + channel, mean.to(output.dtype.element_ty), channel < DIM)
    tl.store(lse + line, peak + tl.log(total))
    if WEIGHTED:
        part = tl.load(owns + line * splits + split, split < splits, float("-inf"))
        peak = finite(tl.max(part, 0))
        tl.store(own + line, peak + tl.log(tl.sum(tl.exp(part - peak), 0)))
