"""Dynamic selection: score keys, cheaply where there are many, and keep the mass.

A short context is scored key by key. In a longer one the keys' codes (`kernels.codes`) name the
candidates that are (`kernels.candidates`), and the others are known by their estimated mass alone.
The budget (`kernels.budget`) then keeps the fewest keys whose share of all mass reaches the target,
and the others count through the means of their pages (`kernels.remainder`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels.budget import cut_by_mass
from kernels.cache import neighbours
from kernels.candidates import estimate_masses, name_candidates
from kernels.page import PAGE
from kernels.remainder import mean_value
from kernels.selection import Selection
from kernels.timing import Phases
from kernels.torch_backend import at_once, head_offsets, prescaled, wide

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.candidates import Masses
    from kernels.policy import Dynamic


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection and what it leaves out."""

    selection: Selection
    log_rest: Tensor  # [rows, heads]  log of the estimated mass that was not selected
    rest: Tensor | None = None  # [rows, heads, head_dim]  the mean value of what was not, if wanted

    def coverage(self, lse: Tensor) -> Tensor:
        """Estimated share of the attention mass on the selected keys, [rows, heads].

        Args:
            lse: [rows, heads], log-sum-exp of attention over the selection. A nan anywhere in
                the scores shows as nan here.
        """
        return torch.sigmoid(lse - self.log_rest)

    def complete(self, output: Tensor, coverage: Tensor) -> Tensor:
        """Attention over the selection and, where it was wanted, the remainder.

        Args:
            output: [rows, heads, head_dim], attention over the selection.
            coverage: [rows, heads], the selection's.
        """
        if self.rest is None:
            return output
        share = coverage[..., None]  # [rows, heads, 1]
        return (output.to(share.dtype) * share + self.rest * (1 - share)).to(output.dtype)


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
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.

    Returns:
        The choice; the recent window (64 to 127 keys) and the visible sinks are always in it. It
        depends on a row's own keys and position alone, never on other rows or on chunk sizes.
    """
    phases = phases or Phases()
    visible = (rows.lengths - rows.starts).tolist()
    whole = [policy.scores_all(keys) for keys in visible]
    if len(set(whole)) == 1:
        return _select(query, cache, rows, policy, scale, phases, max(visible), whole=whole[0])
    # Short contexts must not pay for a long one in their company: each kind on its own.
    parts, places = [], []
    for kind in (True, False):
        some = [row for row, is_whole in enumerate(whole) if is_whole is kind]
        place = torch.tensor(some, device=query.device)
        most = max(visible[row] for row in some)
        own = rows.only(place)
        parts.append(_select(query[place], cache, own, policy, scale, phases, most, whole=kind))
        places.append(place)
    joined = _join(parts)
    order = torch.cat(places).argsort()
    selection = Selection(joined.selection.indices[order], joined.selection.counts[order])
    rest = None if joined.rest is None else joined.rest[order]
    return Choice(selection, joined.log_rest[order], rest)


def _select(
    query: Tensor,
    cache: LayerCache,
    rows: Rows,
    policy: Dynamic,
    scale: float,
    phases: Phases,
    keys: int,
    *,
    whole: bool,
) -> Choice:
    """`select` for rows of one kind, scored `whole` or in two levels, of at most `keys` keys."""
    each = 8 * query.shape[1] * keys  # bytes of a row: its scores and their exponentials,
    if not whole:  # or the copies of its candidates' keys and, for a sequence, of the codes
        each += cache.kv_heads * cache.head_dim * query.itemsize * policy.candidates
        each += cache.kv_heads * cache.head_dim * query.itemsize * keys // rows.queries
    parts = []
    for part, piece in rows.pieces(at_once(query.device, each)):
        with phases.time("score", query.device):
            if whole:
                scored = _score_every_key(query[part], cache, piece, scale)
            else:
                scored = _score_likely_keys(query[part], cache, piece, policy, scale)
        with phases.time("select", query.device):
            parts.append(_choose(scored, cache, piece, policy))
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
    for part, piece in rows.pieces(at_once(query.device, 8 * query.shape[1] * longest)):
        scored = _score_every_key(query[part].to(wide(query.dtype)), cache, piece, scale)
        left = _unselected(
            selection.indices[part], scored.scores.shape[-1], scored.position[..., :1]
        )
        rest = scored.scores.masked_fill(~left[:, :, None], -torch.inf).logsumexp(-1)
        parts.append(torch.sigmoid(lse[part] - rest.flatten(1)))
    return torch.cat(parts)


def rest_of(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Choice:
    """Judge a selection made elsewhere (a fixed pattern's): estimate the mass it leaves out.

    From the codes of the keys; the recent window is scored exactly.
    """
    each = (8 * query.shape[1] + cache.kv_heads * cache.head_dim) * int(rows.visible.max())
    parts = []
    for part, piece in rows.pieces(at_once(query.device, each)):
        own = query[part]
        found = estimate_masses(own, cache, piece, scale)
        first = int(piece.starts.min()) // PAGE * PAGE
        left = _unselected(selection.indices[part], found.mass.shape[-1], first)
        coded = (found.mass @ left.to(found.mass.dtype)[..., None]).squeeze(-1)
        position = _recent_positions(piece, cache.kv_heads)
        recent = _scores_at(own, cache, piece, position, scale)  # [rows, kv_heads, group, 2 * 64]
        start = piece.recent_page[:, None, None] * PAGE
        left = _unselected(selection.indices[part], 2 * PAGE, start) & _visible(position, piece)
        recent = recent.masked_fill(~left[:, :, None], -torch.inf).logsumexp(-1)
        parts.append(torch.logaddexp(coded.log() + found.peak, recent).flatten(1))
    return Choice(selection, torch.cat(parts))


def _unselected(taken: Tensor, width: int, start: Tensor | int) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class _Scored:
    """The candidates of some rows, and the mass of the keys that are none."""

    position: Tensor  # int64 [rows, kv_heads or 1, candidates]  ascending where visible
    visible: Tensor  # bool, as position
    scores: Tensor  # [rows, kv_heads, group, candidates]  exact; -inf where not visible
    others: Tensor  # [rows, kv_heads, group]  log mass of the visible keys that are no candidates
    masses: Masses | None  # estimated masses of all coded keys; None where all are candidates


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
    others = scores.new_full(scores.shape[:3], -torch.inf)
    return _Scored(position, visible, scores, others, None)


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
    """Candidates are the keys whose codes promise the most mass, and the recent ones."""
    near = _recent_positions(rows, cache.kv_heads)  # [rows, kv_heads, 2 * 64]
    exact = _scores_at(query, cache, rows, near, scale)
    exact.masked_fill_(~_visible(near, rows)[:, :, None], -torch.inf)
    found = estimate_masses(query, cache, rows, scale)
    likely, others = name_candidates(found, cache, rows, exact.logsumexp(-1), policy)
    scores = _scores_at(query, cache, rows, likely, scale)
    scores.masked_fill_((likely < 0)[:, :, None], -torch.inf)
    position = torch.cat((likely, near), dim=-1)
    visible = (position >= 0) & _visible(position, rows)
    return _Scored(position, visible, torch.cat((scores, exact), dim=-1), others, found)


def _scores_at(
    query: Tensor, cache: LayerCache, rows: Rows, position: Tensor, scale: float
) -> Tensor:
    """Exact scores of the keys at `position` [rows, kv_heads, n]: [rows, kv_heads, group, n].

    Keys that are not there get some finite-or-not score; the caller masks them.
    """
    count, kv_heads, wanted = position.shape
    if rows.queries * wanted > int(rows.lengths.max()):
        # The rows of a sequence share most of these keys: one product with all of them is cheaper.
        scored = _score_every_key(query, cache, rows, scale)
        place = (position - scored.position[..., :1]).clamp(0, scored.scores.shape[-1] - 1)
        group = query.shape[1] // kv_heads
        return scored.scores.gather(-1, place[:, :, None].expand(-1, -1, group, -1))
    query, scale = prescaled(query, scale)
    last = rows.block_tables.shape[1] * PAGE - 1
    slot = rows.slots(position.clamp(0, last)) + head_offsets(cache, query.device)
    # The cache seen as rows of head_dim numbers, a key at each even row: one copy, keys alone.
    keys = cache.kv.view(-1, cache.head_dim).index_select(0, slot.flatten() * 2)
    keys = keys.view(count * kv_heads, wanted, -1)
    grouped = query.view(count * kv_heads, -1, cache.head_dim)
    # Keys first: the other way round is twice as slow on a CPU in bfloat16.
    product = torch.bmm(keys, grouped.transpose(1, 2)).transpose(1, 2).contiguous()
    return (product.to(wide(query.dtype)) * scale).view(count, kv_heads, -1, wanted)


def _choose(scored: _Scored, cache: LayerCache, rows: Rows, policy: Dynamic) -> Choice:
    """Spend the budget on the candidates."""
    peak = torch.maximum(scored.scores.amax(-1), scored.others)  # [rows, kv_heads, group]
    mass = (scored.scores - peak[..., None]).exp()  # [rows, kv_heads, group, candidates]
    outer = (scored.others - peak).exp()  # [rows, kv_heads, group]
    # The mean over the group of each head's share, as one product.
    weight = 1 / (mass.sum(-1) + outer) / mass.shape[2]  # [rows, kv_heads, group]
    importance = (weight[:, :, None] @ mass).squeeze(2)  # [rows, kv_heads, candidates]
    recent = scored.position >= rows.recent_page[:, None, None] * PAGE
    kept = scored.visible & ((scored.position < policy.sinks) | recent)
    kept, visible = (x.expand(importance.shape) for x in (kept, scored.visible))
    chosen = cut_by_mass(importance, kept, visible, rows.visible, policy)
    left_out = (~chosen).to(mass.dtype)[..., None]  # [rows, kv_heads, candidates, 1]
    inner = (mass @ left_out).squeeze(-1)  # [rows, kv_heads, group]
    log_rest = (inner + outer).log() + peak
    selection = Selection.from_mask(chosen, scored.position)
    if not policy.remainder:
        return Choice(selection, log_rest.flatten(1))
    if scored.masses is not None:
        page_mass = scored.masses.page_mass
        mass, start = (
            scored.masses.mass,
            rows.starts.new_full((rows.sequences,), scored.masses.first),
        )
    else:
        page_mass = mass.view(*mass.shape[:3], -1, PAGE).sum(-1)
        start = scored.position.view(rows.sequences, rows.queries, -1)[:, 0, 0] // PAGE
    rest = mean_value(mass, page_mass, start, cache, rows, selection)
    return Choice(selection, log_rest.flatten(1), rest)


def _recent_positions(rows: Rows, kv_heads: int) -> Tensor:
    """Positions of the recent window's two pages: [rows, kv_heads, 2 * 64]."""
    offset = torch.arange(2 * PAGE, device=rows.lengths.device)
    position = rows.recent_page[:, None, None] * PAGE + offset
    return position.expand(-1, kv_heads, -1)


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
    rests = [part.rest for part in parts if part.rest is not None]
    rest = torch.cat(rests) if rests else None  # all have one, or none has
    return Choice(Selection(torch.cat(padded), counts), log_rest, rest)
