"""Attention in parts, each over a split of the keys, joined by their log-sum-exps.

FlashDecoding (Dao et al. 2023). A single part needs no joining and is written as it will be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu import overlap

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """Attention over each split of the keys."""

    outputs: Tensor  # [rows, heads, splits, head_dim]  float32; of one split, the query's dtype
    lses: Tensor  # float32 [rows, heads, splits]
    owns: Tensor  # likewise, without weights; the same tensor where there are none
    dtype: torch.dtype  # of the query

    @staticmethod
    def of(query: Tensor, splits: int, *, weighted: bool) -> Parts:
        """Room for the parts of a query [rows, heads, head_dim]."""
        count, heads, head_dim = query.shape
        wide = query.dtype if splits == 1 else torch.float32
        outputs = query.new_empty(count, heads, splits, head_dim, dtype=wide)
        lses = outputs.new_empty(count, heads, splits, dtype=torch.float32)
        return Parts(outputs, lses, torch.empty_like(lses) if weighted else lses, query.dtype)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """The output [rows, heads, head_dim], and both log-sum-exps [rows, heads]."""
        count, heads, splits, head_dim = self.outputs.shape
        if splits == 1:
            return self.outputs[:, :, 0], self.lses[:, :, 0], self.owns[:, :, 0]
        weighted, overlaps = self.owns is not self.lses, overlap.possible(self.lses.device)
        output = self.outputs.new_empty(count, heads, head_dim, dtype=self.dtype)
        lse = self.lses.new_empty(count, heads)
        own = torch.empty_like(lse) if weighted else lse
        join_parts[count, heads](
            self.outputs, self.lses, self.owns, output, lse, own, splits,
            SPLITS=triton.next_power_of_2(splits), DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim), WEIGHTED=weighted, OVERLAP=overlaps,
            launch_pdl=overlaps, num_warps=4,
        )  # fmt: skip
        return output, lse, own


@triton.jit
def score_keys(mine, keys, seen, scale):
    """[TILE, BLOCK], -inf where a key is not seen."""
    score = tl.dot(mine, tl.trans(keys), input_precision="ieee") * scale
    return tl.where(seen, score, float("-inf"))


@triton.jit
def add_scores(score, values, peak, total, sums):
    """Some more scores and values into a running softmax (FlashAttention's recurrence)."""
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp(peak - safe)
    mass = tl.exp(score - safe[:, None])
    total = total * shrink + tl.sum(mass, 1)
    sums = tl.dot(mass.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
    return higher, total, sums


@triton.jit
def grow_scores(score, peak, total):
    """Some more scores into a running log-sum-exp."""
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp(peak - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
    return higher, total


@triton.jit
def lse_of(peak, total):
    """A running log-sum-exp as it stands."""
    return tl.where(peak == float("-inf"), 0.0, peak) + tl.log(total)


@triton.jit
def leave(
    outputs, lses, target, channel, wide, there, peak, total, sums, DIM: tl.constexpr
):  # fmt: skip
    """Writes one split's part."""
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
    peak = tl.max(part, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
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
        peak = tl.max(part, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(own + line, peak + tl.log(tl.sum(tl.exp(part - peak), 0)))


@triton.jit
def join_here(
    outputs, lses, output, lse, line, there, channel, wide, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`join_parts` of a tile's lines, of which other programs have left parts in this launch.

    What they left is read past the L1 cache, which does not know of it.
    """
    split = tl.arange(0, SPLITS)
    part = tl.load(
        lses + line[:, None] * splits + split[None],
        there[:, None] & (split < splits)[None],
        float("-inf"),
        cache_modifier=".cg",
    )  # [TILE, SPLITS]
    peak = tl.max(part, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(part - peak[:, None]), 1)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    for one in tl.static_range(SPLITS):
        place = line * splits + one
        left = tl.full((TILE,), one, tl.int32) < splits
        own = tl.load(lses + place, there & left, float("-inf"), cache_modifier=".cg")
        data = tl.load(
            outputs + place[:, None] * DIM + channel[None],
            wide & left[:, None],
            0.0,
            cache_modifier=".cg",
        )  # [TILE, WIDTH]
        sums += data * tl.exp(own - peak)[:, None]
    mean = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    target = output + line[:, None] * DIM + channel[None]
    tl.store(target, mean.to(output.dtype.element_ty), wide)
    tl.store(lse + line, peak + tl.log(total), there)
