"""Dynamic selection: score keys, cheaply where there are many, and keep the mass.

A context of some pages is scored key by key. In a longer one the coarse level (`kernels.coarse`)
names the pages worth it, and the rest are known by their estimated mass alone. The budget
(`kernels.budget`) then keeps the fewest keys whose share of all mass reaches the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels.budget import cut_by_mass
from kernels.coarse import best_pages, score_pages
from kernels.page import PAGE
from kernels.selection import Selection
from kernels.timing import Phases
from kernels.torch_backend import GATHER_BYTES, head_offsets, neighbours, prescaled, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic


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


def select(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases | None = None,
) -> Choice:
    """Choose the keys of each row by content.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache, summaries of complete pages written.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.

    Returns:
        The choice; the recent window (64 to 127 keys) and the visible sinks are always in it. It
        depends on a row's own keys and position alone, never on other rows or on chunk sizes.
    """
    phases = phases or Phases()
    before = (_recent(rows) - rows.starts // PAGE).tolist()  # complete pages to judge, by row
    whole = [policy.pages_scored(pages) >= pages for pages in before]
    if len(set(whole)) == 1:
        return _select(query, cache, rows, policy, scale, phases, max(before), whole=whole[0])
    # Short contexts must not pay for a long one in their company: each kind on its own.
    parts, places = [], []
    for kind in (True, False):
        some = [row for row, is_whole in enumerate(whole) if is_whole is kind]
        place = torch.tensor(some, device=query.device)
        most = max(before[row] for row in some)
        own = rows.only(place)
        parts.append(_select(query[place], cache, own, policy, scale, phases, most, whole=kind))
        places.append(place)
    joined = _join(parts)
    order = torch.cat(places).argsort()
    selection = Selection(joined.selection.indices[order], joined.selection.counts[order])
    return Choice(selection, joined.log_rest[order])


def _select(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases,
    before: int,
    *,
    whole: bool,
) -> Choice:
    """`select` for rows of one kind, scored `whole` or in two levels, with `before` pages each."""
    candidates = (policy.pages_scored(before) + 2) * PAGE
    # Bytes a candidate: scores and their exponentials, or the copy of its key.
    each = 8 * query.shape[1] if whole else cache.kv_heads * cache.head_dim * query.itemsize
    parts = []
    for part, piece in rows.pieces(_rows_at_once(candidates * each)):
        with phases.time("score", query.device):
            if whole:
                scored = _score_every_key(query[part], cache, piece, scale)
            else:
                scored = _score_likely_keys(query[part], cache, piece, policy, scale)
        with phases.time("select", query.device):
            parts.append(_choose(scored, piece, policy))
    return _join(parts)


def true_coverage(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, lse: Tensor, scale: float
) -> Tensor:
    """Share of the attention mass that a selection carries: every key is read, in float32.

    Args:
        query: [rows, heads, head_dim].
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        selection: the keys each row attends to.
        lse: [rows, heads], log-sum-exp of attention over the selection.
        scale: factor on the scores.

    Returns:
        [rows, heads], 0 to 1.
    """
    longest = int(rows.visible.max()) + 2 * PAGE
    parts = []
    for part, piece in rows.pieces(_rows_at_once(8 * query.shape[1] * longest)):
        scored = _score_every_key(query[part].to(wide(query.dtype)), cache, piece, scale)
        taken = selection.indices[part]
        width = scored.scores.shape[-1]
        column = torch.where(taken >= 0, taken - scored.position[..., :1], width)
        # One column more takes the writes of the padding.
        mask = torch.zeros(*taken.shape[:2], width + 1, dtype=torch.bool, device=query.device)
        mask = mask.scatter_(2, column, True)[..., :-1]
        rest = scored.scores.masked_fill(mask[:, :, None], -torch.inf).logsumexp(-1)
        parts.append(torch.sigmoid(lse[part] - rest.flatten(1)))
    return torch.cat(parts)


def _rows_at_once(each: int) -> int:
    """How many rows of `each` bytes make a piece."""
    return max(1, GATHER_BYTES // each)


def rest_of(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Choice:
    """Judge a selection made elsewhere (a fixed pattern's): estimate the mass it leaves out.

    A page that is partly selected leaves out its unselected share; the keys behind the last
    summary are scored one by one.
    """
    pages = score_pages(query, cache, rows, scale)
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
    position = _positions(recent)
    scores = _score_keys(query, cache, rows, recent, scale)  # [rows, kv_heads, group, 2 * 64]
    offset = taken - recent[:, :, :1] * PAGE  # [rows, kv_heads, capacity]
    inside = (taken >= 0) & (offset >= 0)
    # One slot more takes the writes of the keys that are not recent.
    chosen = torch.zeros(count, kv_heads, 2 * PAGE + 1, dtype=torch.bool, device=query.device)
    chosen.scatter_(2, torch.where(inside, offset, 2 * PAGE), inside)
    chosen = chosen[..., :-1]  # [rows, kv_heads, 2 * 64]
    inner = scores.masked_fill(~(_visible(position, rows) & ~chosen)[:, :, None], -torch.inf)
    log_rest = torch.logaddexp(outer.logsumexp(-1), inner.logsumexp(-1))
    return Choice(selection, log_rest.flatten(1))


@dataclass(frozen=True, slots=True)
class _Scored:
    """The candidates of some rows, and the mass of the keys that are none."""

    position: Tensor  # int64 [rows, kv_heads or 1, candidates]  ascending where visible
    visible: Tensor  # bool, as position
    scores: Tensor  # [rows, kv_heads, group, candidates]  exact; -inf where not visible
    far: Tensor  # [rows, kv_heads, group, pages]  log mass of pages without candidates, or -inf


def _score_every_key(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> _Scored:
    """Every visible key is a candidate; a sequence's keys are read once for all its rows.

    A query wider than the cache has its products computed in its own dtype.
    """
    query, scale = prescaled(query, scale)
    count, heads, head_dim = query.shape
    kv_heads, queries = cache.kv_heads, rows.queries
    first = rows.starts.view(-1, queries).amin(1) // PAGE  # [sequences]
    last = -(-rows.lengths.view(-1, queries).amax(1) // PAGE)  # [sequences]
    width = int((last - first).max()) * PAGE
    offset = torch.arange(width, device=query.device)
    position = (first.repeat_interleave(queries)[:, None] * PAGE + offset)[:, None]
    visible = _visible(position, rows)  # [rows, 1, width]
    scores = query.new_empty(count, kv_heads, heads // kv_heads, width, dtype=wide(query.dtype))
    for number, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        part = slice(number * queries, (number + 1) * queries)
        keys = _keys_of_pages(cache, rows.block_tables[number, low:high])
        grouped = query[part].view(queries, kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
        for head in range(kv_heads):  # one product over them all would copy the keys first
            product = grouped[head] @ keys[head].to(query.dtype).T  # [queries * group, keys]
            target = scores[part, head, :, : keys.shape[1]]  # [queries, group, keys]
            target.copy_(product.view(target.shape)).mul_(scale)
    scores.masked_fill_(~visible[:, :, None], -torch.inf)
    return _Scored(position, visible, scores, scores[..., :0])


def _keys_of_pages(cache: LayerCache, table: Tensor) -> Tensor:
    """The keys of physical pages `table` [pages], in place where they are neighbours.

    Returns:
        [kv_heads, pages * 64, head_dim].
    """
    start = neighbours(table)
    if start is None:
        return cache.kv[:, table, :, 0].flatten(1, 2)
    run = cache.kv[:, start : start + table.shape[0]]
    return run.view(cache.kv_heads, -1, 2, cache.head_dim)[:, :, 0]


def _score_likely_keys(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float
) -> _Scored:
    """Candidates are the keys of the pages that the coarse level prefers, and the recent ones."""
    pages = score_pages(query, cache, rows, scale)
    near = best_pages(pages, policy)  # [rows, kv_heads, survivors]
    position = _positions(near)
    visible = _visible(position, rows)
    scores = _score_keys(query, cache, rows, near, scale)
    scores.masked_fill_(~visible[:, :, None], -torch.inf)
    scored = torch.zeros_like(pages.rank, dtype=torch.bool)  # [rows, kv_heads, pages]
    coarse = (near >= 0) & (near < pages.recent[:, None, None])
    scored.scatter_(2, torch.where(coarse, near, 0), coarse)
    scored[:, :, 0] |= (near == 0).any(-1)
    far = pages.log_mass.masked_fill(scored[:, :, None], -torch.inf)
    return _Scored(position, visible, scores, far)


def _score_keys(
    query: Tensor, cache: LayerCache, rows: Rows, pages: Tensor, scale: float
) -> Tensor:
    """Exact scores of the keys of `pages` [rows, kv_heads, n]: [rows, kv_heads, group, n * 64].

    Keys that are not visible get some finite-or-not score; the caller masks them.
    """
    query, scale = prescaled(query, scale)
    count, kv_heads, wanted = pages.shape
    table = rows.block_tables.repeat_interleave(rows.queries, dim=0)  # [rows, pages]
    logical = pages.clamp(0, table.shape[1] - 1)
    slot = table.gather(1, logical.flatten(1)).view(logical.shape) * PAGE
    slot = slot + head_offsets(cache, slot.device)  # [rows, kv_heads, n]
    # The cache seen as rows of head_dim numbers, a key at each even row: one copy, keys alone.
    key = (slot[..., None] + torch.arange(PAGE, device=slot.device)).flatten() * 2
    keys = cache.kv.view(-1, cache.head_dim).index_select(0, key)
    keys = keys.view(count * kv_heads, wanted * PAGE, -1)
    grouped = query.view(count * kv_heads, -1, cache.head_dim)
    # Keys first: the other way round is twice as slow on a CPU in bfloat16.
    product = torch.bmm(keys, grouped.transpose(1, 2)).transpose(1, 2).contiguous()
    return (product.to(wide(query.dtype)) * scale).view(count, kv_heads, -1, wanted * PAGE)


def _choose(scored: _Scored, rows: Rows, policy: Dynamic) -> Choice:
    """Spend the budget on the candidates."""
    peak = scored.scores.amax(-1)  # [rows, kv_heads, group]
    if scored.far.shape[-1]:
        peak = torch.maximum(peak, scored.far.amax(-1))
    mass = (scored.scores - peak[..., None]).exp()  # [rows, kv_heads, group, candidates]
    outer = (scored.far - peak[..., None]).exp().sum(-1)  # [rows, kv_heads, group]
    # The mean over the group of each head's share, as one product.
    weight = 1 / (mass.sum(-1) + outer) / mass.shape[2]  # [rows, kv_heads, group]
    importance = (weight[:, :, None] @ mass).squeeze(2)  # [rows, kv_heads, candidates]
    recent = scored.position >= _recent(rows)[:, None, None] * PAGE
    kept = scored.visible & ((scored.position < policy.sinks) | recent)
    kept, visible = (x.expand(importance.shape) for x in (kept, scored.visible))
    chosen = cut_by_mass(importance, kept, visible, policy)
    left_out = (~chosen).to(mass.dtype)[..., None]  # [rows, kv_heads, candidates, 1]
    inner = (mass @ left_out).squeeze(-1)  # [rows, kv_heads, group]
    log_rest = (inner + outer).log() + peak
    return Choice(Selection.from_mask(chosen, scored.position), log_rest.flatten(1))


def _recent(rows: Rows) -> Tensor:
    """int64 [rows], the page with which each row's always-kept window begins."""
    return (rows.lengths // PAGE - 1).clamp_min(0)


def _positions(pages: Tensor) -> Tensor:
    """Positions of the keys of `pages` [rows, kv_heads, n]: [rows, kv_heads, n * 64]."""
    return (pages[..., None] * PAGE + torch.arange(PAGE, device=pages.device)).flatten(2)


def _visible(position: Tensor, rows: Rows) -> Tensor:
    """Which of `position` [rows, ..., candidates] their rows may see."""
    start, stop = rows.starts[:, None, None], rows.lengths[:, None, None]
    return (position >= start) & (position < stop)


def _join(parts: list[Choice]) -> Choice:
    if len(parts) == 1:
        return parts[0]
    indices = [part.selection.indices for part in parts]
    capacity = max(one.shape[2] for one in indices)
    padded = [F.pad(one, (0, capacity - one.shape[2]), value=-1) for one in indices]
    counts = torch.cat([part.selection.counts for part in parts])
    log_rest = torch.cat([part.log_rest for part in parts])
    return Choice(Selection(torch.cat(padded), counts), log_rest)
