"""The estimated mass that each page keeps when its selected keys are taken out.

Masses are added up as whole numbers, so that the order in which programs add does not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.selection import Selection

UNIT = 2.0**-40
"""Of a head's estimated mass."""
BLOCK = 256
"""Selected keys that a program takes."""


def left_mass(
    scores: Tensor, page_lse: Tensor, lse: Tensor, selection: Selection, stops: Tensor, first: int
) -> Tensor:
    """Share of each head's estimated mass that is of unselected keys, page by page.

    Args:
        scores: float32 [rows, kv_heads, group, keys], by the codes; -inf where a key is not coded.
            Selected keys get -inf too: what is left are the unselected ones.
        page_lse: float32 [rows, kv_heads, group, pages], their log-sum-exp by page.
        lse: float32 [rows, kv_heads, group], their log-sum-exp.
        selection: what was selected.
        stops: int64 [rows], where the recent window begins, none of whose pages have a mean.
        first: position of the first key.

    Returns:
        float32 [rows, kv_heads, group, pages].
    """
    rows, kv_heads, group, pages = page_lse.shape
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    taken = torch.zeros(page_lse.shape, dtype=torch.int64, device=scores.device)
    capacity = indices.shape[-1]
    if capacity:
        _take[rows, kv_heads, -(-capacity // BLOCK)](
            scores, lse, indices, counts, stops, taken,
            capacity, first, scores.shape[-1], pages, 1 / UNIT,
            GROUP=group, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
        )  # fmt: skip
    known = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]  # of a row without coded keys
    return (page_lse - known).exp_().sub_(taken * UNIT).clamp_min_(0)


@triton.jit(do_not_specialize=["capacity", "first", "keys", "pages"])
def _take(
    scores, lse, indices, counts, stops, taken,
    capacity, first, keys, pages, units,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Adds up the mass of some of the selected keys of a row and KV head, and takes them out."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(2)
    line = row * tl.num_programs(1) + tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    listed = place < tl.load(counts + line)
    position = tl.load(indices + line * capacity + place, listed, -1)
    coded = listed & (position >= first) & (position < tl.load(stops + row))
    for head in tl.static_range(GROUP):
        base = line * GROUP + head
        score = tl.load(scores + base * keys + position - first, coded, float("-inf"))
        mass = tl.exp(score - tl.load(lse + base)) * units
        mass = tl.where(mass == mass, mass, 0.0)
        page = (position - first) // PAGE
        tl.atomic_add(taken + base * pages + page, mass.to(tl.int64), coded)
        tl.store(scores + base * keys + position - first, float("-inf"), coded)
