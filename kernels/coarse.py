"""The coarse level: which pages may matter, from a mean and a variance a page.

A page's attention mass is estimated as if its keys were normal, log sum exp(q.k) = log 64 + q.mean
+ (q*q).variance / 2, and its best key as some standard deviations above the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.budget import greatest, top
from kernels.page import PAGE
from kernels.selection import Selection
from kernels.torch_backend import neighbours, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic

# A page counts for the best key it may hold, not only for its mean mass: one sharp key among 64
# moves the standard deviation far more than the mean. Of 1 to 4, three lost the least on a trained
# model's keys.
SPREAD = 3.0


@dataclass(frozen=True, slots=True)
class Pages:
    """Coarse scores of the complete pages in front of each row's recent window."""

    log_mass: Tensor  # [rows, kv_heads, group, pages]  estimated log mass; -inf where not coarse
    rank: Tensor  # [rows, kv_heads, pages]  coarse score, -inf where not coarse
    recent: Tensor  # int64 [rows]  page with which the always-kept window begins
    first: Tensor  # int64 [rows]  page that holds the first visible key


def score_pages(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> Pages:
    """Score every page from its summary alone; arguments as in `kernels.dynamic.select`."""
    count, heads, head_dim = query.shape
    kv_heads, sequences = cache.kv_heads, rows.sequences
    group = heads // kv_heads
    dtype = wide(query.dtype)
    recent = (rows.lengths // PAGE - 1).clamp_min(0)  # [rows]
    first = torch.minimum(rows.starts // PAGE, recent)  # [rows]
    pages = int(recent.max())
    summary = _summaries(cache, rows.block_tables[:, :pages])  # [kv_heads * sequences, pages, ..]
    grouped = query.view(sequences, rows.queries, kv_heads, group, head_dim)
    grouped = grouped.permute(2, 0, 1, 3, 4).reshape(kv_heads * sequences, -1, head_dim) * scale
    # q against means and q*q against variances in one product: [q, 0] and [0, q*q] side by side.
    zero = torch.zeros_like(grouped)
    left = torch.cat((grouped, zero), dim=-1)
    right = torch.cat((zero, grouped.square()), dim=-1)
    both = torch.cat((left, right), dim=1)  # [kv_heads * sequences, 2 * .., 2 * head_dim]
    moments = torch.bmm(summary, both.transpose(1, 2))  # [kv_heads * sequences, pages, 2 * ..]
    moments = moments.transpose(1, 2).to(dtype).contiguous()
    moments = moments.view(kv_heads, sequences, 2, rows.queries, group, pages)
    moments = moments.permute(2, 1, 3, 0, 4, 5).reshape(2, count, kv_heads, group, pages)
    mean, variance = moments[0], moments[1].clamp_min(0)
    log_mass = torch.add(mean, variance, alpha=0.5) + math.log(PAGE)
    peak = torch.add(mean, variance.sqrt(), alpha=SPREAD)
    # A lone row's pages are all its own, unless a sliding window hides the first of them.
    hidden = None if count == 1 and not first.any() else _hidden(first, recent, pages)
    if hidden is not None:
        log_mass.masked_fill_(hidden, -torch.inf)
        peak.masked_fill_(hidden, -torch.inf)
    # Heads of a group differ in scale; each votes with its own softmax over the pages.
    rank = (peak - peak.logsumexp(-1, keepdim=True)).amax(2)
    if hidden is not None:
        rank.masked_fill_(hidden[:, :, 0], -torch.inf)
    return Pages(log_mass, rank, recent, first)


def _hidden(first: Tensor, recent: Tensor, pages: int) -> Tensor:
    """bool [rows, 1, 1, pages], the pages that are not between `first` and `recent` [rows]."""
    page = torch.arange(pages, device=first.device)
    return ((page < first[:, None]) | (page >= recent[:, None]))[:, None, None]


def _summaries(cache: LayerCache, tables: Tensor) -> Tensor:
    """Summaries of the pages of `tables` [sequences, pages].

    Returns:
        [kv_heads * sequences, pages, 2 * head_dim], means in front of variances.
    """
    flat = tables.flatten()  # [sequences * pages]
    start = neighbours(flat)
    if start is None:
        chosen = cache.summary.index_select(1, flat)
    else:
        chosen = cache.summary[:, start : start + flat.shape[0]]
    kv_heads, head_dim = cache.kv_heads, cache.head_dim
    return chosen.reshape(kv_heads * tables.shape[0], tables.shape[1], 2 * head_dim)


def best_pages(pages: Pages, policy: Dynamic) -> Tensor:
    """int64 [rows, kv_heads, survivors + 2]: pages to score, ascending where not -1.

    Page 0 (when visible) is always among them, and last stand the recent window's two pages.
    """
    kv_heads = pages.rank.shape[1]
    rank = pages.rank.clone()
    # The sinks' page comes first wherever it is visible.
    rank[:, :, :1] = torch.where(rank[:, :, :1] == -torch.inf, -torch.inf, torch.inf)
    wanted = torch.tensor(
        [policy.pages_scored(n) for n in (pages.recent - pages.first).tolist()],
        device=rank.device,
    )  # [rows]
    ranked = greatest(rank, int(wanted.max()))
    mask = top(rank, wanted[:, None].expand(rank.shape[:2]), ranked) & (rank > -torch.inf)
    best = Selection.from_mask(mask, torch.arange(rank.shape[-1], device=rank.device)).indices
    recent = pages.recent[:, None, None] + torch.arange(2, device=rank.device)
    return torch.cat((best, recent.expand(-1, kv_heads, -1)), dim=2)
