"""Dynamic selection: score pages cheaply, keys of the best pages exactly, keep the mass.

Two levels. The coarse one reads a mean and a variance a page and estimates each page's attention
mass as if its keys were normal: log sum exp(q.k) = log 64 + q.mean + (q*q).variance / 2. The
second scores the keys of the surviving pages one by one. The budget then keeps the fewest keys
whose estimated share of all mass reaches the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.page import PAGE
from kernels.selection import Selection
from kernels.torch_backend import GATHER_BYTES, head_offsets, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic

# A page counts for the best key it may hold, not only for its mean mass: one sharp key among 64
# moves the standard deviation far more than the mean.
SPREAD = 2.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection and what it leaves out."""

    selection: Selection
    log_rest: Tensor  # [rows, heads]  log of the estimated mass that was not selected

    def coverage(self, lse: Tensor) -> Tensor:
        """Estimated share of the attention mass on the selected keys, [rows, heads].

        Args:
            lse: [rows, heads], log-sum-exp of attention over the selection. A nan anywhere in
                the scores shows as nan here.
        """
        return torch.sigmoid(lse - self.log_rest)


def select(query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float) -> Choice:
    """Choose the keys of each row by content.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache, summaries of complete pages written.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.

    Returns:
        The choice; the recent window (64 to 127 keys) and the visible sinks are always in it. It
        depends on a row's own keys and position alone, never on other rows or on chunk sizes.
    """
    pages = _score_pages(query, cache, rows, scale)
    survivors = _best_pages(pages, policy)  # [rows, kv_heads, survivors]
    kv_heads, head_dim = cache.kv_heads, cache.head_dim
    count = survivors.shape[2] * PAGE
    step = max(1, GATHER_BYTES // (kv_heads * count * head_dim * query.itemsize))
    parts = [
        _select_rows(query, cache, rows, policy, scale, pages, survivors, start, start + step)
        for start in range(0, query.shape[0], step)
    ]
    return _join(parts)


def rest_of(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Choice:
    """Judge a selection made elsewhere (a fixed pattern's): estimate the mass it leaves out.

    A page that is partly selected leaves out its unselected share; the keys behind the last
    summary are scored one by one.
    """
    pages = _score_pages(query, cache, rows, scale)
    count, kv_heads = selection.counts.shape
    taken = selection.indices  # [rows, kv_heads, capacity]
    per_page = torch.zeros(
        count, kv_heads, int(rows.lengths.max()) // PAGE + 2, device=query.device
    )
    per_page.scatter_add_(2, taken.clamp_min(0) // PAGE, (taken >= 0).to(per_page.dtype))
    unselected = 1 - per_page[:, :, : pages.log_mass.shape[-1]] / PAGE  # [rows, kv_heads, pages]
    outer = pages.log_mass + unselected.clamp_min(0).log()[:, :, None]
    recent = pages.recent[:, None, None] + torch.arange(2, device=query.device)
    recent = recent.expand(-1, kv_heads, -1)  # [rows, kv_heads, 2]
    _position, visible = _keys_of(recent, rows.lengths, rows.starts)
    scores = _score_keys(query, cache, rows, recent, scale)  # [rows, kv_heads, group, 2 * 64]
    offset = taken - recent[:, :, :1] * PAGE  # [rows, kv_heads, capacity]
    inside = (taken >= 0) & (offset >= 0)
    # One slot more takes the writes of the keys that are not recent.
    chosen = torch.zeros(count, kv_heads, 2 * PAGE + 1, dtype=torch.bool, device=query.device)
    chosen.scatter_(2, torch.where(inside, offset, 2 * PAGE), inside)
    chosen = chosen[..., :-1]  # [rows, kv_heads, 2 * 64]
    inner = scores.masked_fill(~(visible & ~chosen)[:, :, None], -torch.inf)
    return Choice(selection, _logsumexp(outer, inner).flatten(1))


@dataclass(frozen=True, slots=True)
class _Pages:
    log_mass: Tensor  # [rows, kv_heads, group, pages]  estimated log mass; -inf where not coarse
    rank: Tensor  # [rows, kv_heads, pages]  coarse score, -inf where not coarse
    recent: Tensor  # int64 [rows]  page with which the always-kept window begins
    first: Tensor  # int64 [rows]  page that holds the first visible key


def _score_pages(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> _Pages:
    count, heads, head_dim = query.shape
    kv_heads, sequences = cache.kv_heads, rows.sequences
    group = heads // kv_heads
    dtype = wide(query.dtype)
    recent = (rows.lengths // PAGE - 1).clamp_min(0)  # [rows]
    first = torch.minimum(rows.starts // PAGE, recent)  # [rows]
    pages = int(recent.max())
    summary = _summaries(cache, rows.block_tables[:, :pages])  # [kv_heads * sequences, pages, ..]
    grouped = query.view(sequences, rows.queries, kv_heads, group, head_dim)
    grouped = grouped.permute(2, 0, 1, 3, 4).reshape(kv_heads * sequences, -1, head_dim)
    # q against means and q*q against variances in one product: [q, 0] and [0, q*q] side by side.
    zero = torch.zeros_like(grouped)
    left = torch.cat((grouped, zero), dim=-1)
    right = torch.cat((zero, grouped.square()), dim=-1)
    both = torch.cat((left, right), dim=1)  # [kv_heads * sequences, 2 * .., 2 * head_dim]
    moments = torch.bmm(summary, both.transpose(1, 2))  # [kv_heads * sequences, pages, 2 * ..]
    mean, variance = moments.chunk(2, dim=-1)

    def by_row(scores: Tensor) -> Tensor:  # [rows, kv_heads, group, pages]
        split = scores.reshape(kv_heads, sequences, pages, rows.queries, group).to(dtype)
        return split.permute(1, 3, 0, 4, 2).reshape(count, kv_heads, group, pages)

    mean = by_row(mean) * scale
    variance = by_row(variance).clamp_min(0) * scale**2
    page = torch.arange(pages, device=query.device)
    coarse = (page >= first[:, None]) & (page < recent[:, None])  # [rows, pages]
    hidden = ~coarse[:, None, None]
    log_mass = (mean + variance / 2 + math.log(PAGE)).masked_fill(hidden, -torch.inf)
    peak = (mean + SPREAD * variance.sqrt()).masked_fill(hidden, -torch.inf)
    # Heads of a group differ in scale; each votes with its own softmax over the pages.
    normal = peak - peak.logsumexp(-1, keepdim=True)
    rank = normal.amax(2).masked_fill(hidden[:, :, 0], -torch.inf)
    return _Pages(log_mass, rank, recent, first)


def _summaries(cache: LayerCache, tables: Tensor) -> Tensor:
    """Summaries of the pages of `tables` [sequences, pages].

    Returns:
        [kv_heads * sequences, pages, 2 * head_dim], means in front of variances.
    """
    flat = tables.flatten()  # [sequences * pages]
    first, count = flat[:1], flat.shape[0]
    if count and torch.equal(flat, first + torch.arange(count, device=flat.device)):
        # Neighbouring pages are read in place.
        chosen = cache.summary[:, int(first) : int(first) + count]
    else:
        chosen = cache.summary.index_select(1, flat)
    kv_heads, head_dim = cache.kv_heads, cache.head_dim
    return chosen.reshape(kv_heads * tables.shape[0], tables.shape[1], 2 * head_dim)


def _best_pages(pages: _Pages, policy: Dynamic) -> Tensor:
    """int64 [rows, kv_heads, survivors + 2]: pages to score, ascending where not -1.

    Page 0 (when visible) is always among them, and last stand the recent window's two pages.
    """
    kv_heads = pages.rank.shape[1]
    rank = pages.rank.clone()
    if rank.shape[-1]:
        rank[:, :, 0] = torch.where(
            rank[:, :, 0] == -torch.inf, -torch.inf, torch.inf
        )  # the sinks' page
    wanted = torch.tensor(
        [policy.pages_scored(n) for n in (pages.recent - pages.first).tolist()],
        device=rank.device,
    )  # [rows]
    # A stable sort gives ties to the lowest page.
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : int(wanted.max())]
    place = torch.arange(best.shape[-1], device=rank.device)
    best = best.masked_fill(place >= wanted[:, None, None], -1).sort(dim=-1).values
    recent = pages.recent[:, None, None] + torch.arange(2, device=rank.device)
    return torch.cat((best, recent.expand(-1, kv_heads, -1)), dim=2)


def _top(scores: Tensor, wanted: Tensor, ranked: Tensor) -> Tensor:
    """The greatest scores; ties go to the lowest index.

    Args:
        scores: [..., n].
        wanted: int64 [...], how many.
        ranked: [..., most], the greatest scores in descending order, most >= wanted.

    Returns:
        bool [..., n].
    """
    if ranked.shape[-1] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = ranked.gather(-1, (wanted - 1).clamp_min(0)[..., None])  # [..., 1]
    above = scores > least
    level = scores == least
    room = wanted[..., None] - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


def _keys_of(pages: Tensor, lengths: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the keys of `pages` [rows, kv_heads, n] and whether each is visible."""
    offset = torch.arange(PAGE, device=pages.device)
    position = (pages[..., None] * PAGE + offset).flatten(2)  # [rows, kv_heads, n * 64]
    visible = (position >= starts[:, None, None].clamp_min(0)) & (position < lengths[:, None, None])
    return position, visible


def _score_keys(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    pages: Tensor,
    scale: float,
    start: int = 0,
) -> Tensor:
    """Exact scores of the keys of `pages` [rows, kv_heads, n]: [rows, kv_heads, group, n * 64].

    Keys that are not visible get some finite-or-not score; the caller masks them. `start` is the
    number of the first of these rows among `rows`.
    """
    count, kv_heads, wanted = pages.shape
    head_dim = cache.head_dim
    sequence = torch.arange(start, start + count, device=query.device) // rows.queries
    table = rows.block_tables[sequence]  # [rows, pages]
    logical = pages.clamp(0, table.shape[1] - 1)
    slot = table.gather(1, logical.flatten(1)).view(logical.shape) * PAGE
    slot = slot + head_offsets(cache, slot.device)  # [rows, kv_heads, n]
    # The cache seen as rows of head_dim numbers, a key at each even row: one copy, keys alone.
    key = (slot[..., None] + torch.arange(PAGE, device=slot.device)).flatten() * 2
    keys = cache.kv.view(-1, head_dim).index_select(0, key)
    keys = keys.view(count * kv_heads, wanted * PAGE, head_dim)
    grouped = query.view(count * kv_heads, -1, head_dim)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).to(wide(query.dtype)) * scale
    return scores.view(count, kv_heads, -1, wanted * PAGE)


def _select_rows(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    pages: _Pages,
    survivors: Tensor,
    start: int,
    stop: int,
) -> Choice:
    """`select` for the rows `start` to `stop`, whose surviving pages are known."""
    part = slice(start, stop)
    near = survivors[part]
    position, visible = _keys_of(near, rows.lengths[part], rows.starts[part])
    scores = _score_keys(query[part], cache, rows, near, scale, start)
    scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    # Pages that were not refined keep their coarse estimate.
    far = pages.log_mass[part].clone()  # [rows, kv_heads, group, pages]
    scored = torch.zeros_like(pages.rank[part], dtype=torch.bool)  # [rows, kv_heads, pages]
    if scored.shape[-1]:
        coarse = (near >= 0) & (near < pages.recent[part, None, None])
        scored.scatter_(2, torch.where(coarse, near, 0), coarse)
        scored[:, :, 0] |= (near == 0).any(-1)
    far = far.masked_fill(scored[:, :, None], -torch.inf)
    peak = torch.maximum(scores.amax(-1), _peak(far))  # [rows, kv_heads, group]
    mass = (scores - peak[..., None]).exp()  # [rows, kv_heads, group, candidates]
    outer = (far - peak[..., None]).exp().sum(-1)  # [rows, kv_heads, group]
    # The mean over the group of each head's share, as one product.
    weight = 1 / (mass.sum(-1) + outer) / mass.shape[2]  # [rows, kv_heads, group]
    importance = (weight[:, :, None] @ mass).squeeze(2)  # [rows, kv_heads, candidates]
    recent = pages.recent[part, None, None] * PAGE
    kept = visible & ((position < policy.sinks) | (position >= recent))
    chosen = cut_by_mass(importance, kept, visible, policy)
    left_out = (~chosen).to(mass.dtype)[..., None]  # [rows, kv_heads, candidates, 1]
    inner = (mass @ left_out).squeeze(-1)  # [rows, kv_heads, group]
    log_rest = (inner + outer).log() + peak
    return Choice(Selection.from_mask(chosen, position), log_rest.flatten(1))


def _peak(scores: Tensor) -> Tensor:
    """Greatest score along the last axis, which may be empty."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.amax(-1)


def cut_by_mass(importance: Tensor, kept: Tensor, eligible: Tensor, policy: Dynamic) -> Tensor:
    """Top-p between two top-k bounds; `kernels.reference.cut_by_mass` is its meaning.

    Args:
        importance: [rows, kv_heads, candidates], share of the row's attention mass.
        kept: bool, same shape: always chosen.
        eligible: bool, same shape: may be chosen.
        policy: the bounds.

    Returns:
        bool [rows, kv_heads, candidates].
    """
    always = kept.sum(-1)  # [rows, kv_heads]
    free = eligible & ~kept
    scores = importance.masked_fill(~free, -1.0)
    most = min(policy.max_keys, scores.shape[-1])
    ranked = scores.topk(most, dim=-1).values
    mass = importance.masked_fill(~kept, 0.0).sum(-1, keepdim=True)
    reached = torch.cat(
        (mass, mass + ranked.clamp_min(0).cumsum(-1)), dim=-1
    )  # [rows, kv_heads, most + 1]
    needed = (reached < policy.coverage).sum(-1)
    wanted = needed.clamp_min(policy.min_keys - always).clamp_max(policy.max_keys - always)
    wanted = torch.minimum(wanted, free.sum(-1)).clamp_min(0)
    return kept | _top(scores, wanted, ranked)


def _logsumexp(left: Tensor, right: Tensor) -> Tensor:
    """log-sum-exp over the last axes of both."""
    return torch.logaddexp(left.logsumexp(-1), right.logsumexp(-1))


def _join(parts: list[Choice]) -> Choice:
    if len(parts) == 1:
        return parts[0]
    capacity = max(part.selection.indices.shape[2] for part in parts)
    indices = [
        torch.nn.functional.pad(
            part.selection.indices, (0, capacity - part.selection.indices.shape[2]), value=-1
        )
        for part in parts
    ]
    counts = torch.cat([part.selection.counts for part in parts])
    return Choice(
        Selection(torch.cat(indices), counts), torch.cat([part.log_rest for part in parts])
    )
