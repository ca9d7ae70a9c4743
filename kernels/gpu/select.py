"""`kernels.dynamic.select` for rows of one kind, in Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from kernels.gpu.candidates import choose
from kernels.gpu.cut import MOST, NEAR, cut
from kernels.gpu.draw import correction
from kernels.gpu.remainder import left_mass
from kernels.gpu.scan import scan
from kernels.gpu.score import score_chosen, score_run
from kernels.page import PAGE
from kernels.selection import unselected
from kernels.torch_backend import at_once as rows_at_once

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.policy import Dynamic
    from kernels.selection import Selection
    from kernels.timing import Phases


def at_once(rows: Rows, each: int) -> int:
    """How many rows of `each` bytes are selected for together.

    Those of one sequence alone where a window moves the first key: the scores span the keys of all.
    """
    most = rows_at_once(rows.lengths.device, each)
    return min(most, rows.queries) if bool(rows.starts.any()) else most


def fits(policy: Dynamic, keys: int) -> bool:
    """Whether a program can hold the candidates among `keys` keys."""
    return (keys if policy.scores_all(keys) else policy.candidates) <= MOST


def select(
    query: Tensor, cache: LayerCache, rows: Rows, policy: Dynamic, scale: float, phases: Phases,
    *, whole: bool,
) -> tuple[Selection, Tensor, Tensor | None]:  # fmt: skip
    """Choose keys.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache, complete pages coded.
        rows: where each row's keys lie.
        policy: the budget.
        scale: factor on the scores.
        phases: notes the time of scoring and of selecting, where it is on.
        whole: whether all keys are scored exactly.

    Returns:
        The selection; float32 [rows, heads], the log of the mass left out; and, where the policy
        wants it, float32 [rows, heads, head_dim], the mean value of what was left out.
    """
    query = query.contiguous()
    score, choice = (partial(phases.time, name, query.device) for name in ("score", "select"))
    count, heads, head_dim = query.shape
    with score():
        found = (_score_all if whole else _estimate)(query, cache, rows, scale)
    if found.keys == 0:
        others = torch.full_like(found.lse, -torch.inf)
        with choice():
            selection, rest = cut(found.scores, None, 0, found.near, others, rows, policy)
        mean = found.near.new_zeros(count, heads, head_dim) if policy.remainder else None
        return selection, rest.flatten(1), mean
    position, exact, chosen = found.first * PAGE, found.scores, None
    others = torch.full_like(found.lse, -torch.inf)
    if not whole:
        norm = torch.logaddexp(found.lse, found.near.logsumexp(-1))  # [rows, kv_heads, group]
        with choice():
            chosen, least = choose(
                found.scores, norm, rows.starts, found.stops, position,
                policy.sinks, policy.candidates,
            )  # fmt: skip
        with score():
            exact, others = score_chosen(
                query, cache, rows, scale, chosen, least, found.scores, found.lse, norm, position
            )
    with choice():
        selection, rest = cut(exact, chosen, position, found.near, others, rows, policy)
        if not policy.remainder:
            return selection, rest.flatten(1), None
        left = _left(found, selection)
        mean = _mean_value(left, cache, rows, found.first)
        if policy.draws:
            mean += correction(
                found.scores, found.lse, left, cache, rows, found.first, policy.draws
            )
    return selection, rest.flatten(1), mean


def mass_left(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> Tensor:
    """Log of the estimated mass that a selection made elsewhere leaves out; float32 [rows, heads].

    From the codes of the keys; the recent window is scored exactly.
    """
    found = _estimate(query.contiguous(), cache, rows, scale)
    recent = found.near.masked_fill(
        ~unselected(selection.indices, NEAR, found.stops[:, None, None])[:, :, None], -torch.inf
    ).logsumexp(-1)  # [rows, kv_heads, group]
    if found.keys == 0:
        return recent.flatten(1)
    coded = found.lse + _left(found, selection).sum(-1).log()
    return torch.logaddexp(coded, recent).flatten(1)


@dataclass(frozen=True, slots=True)
class _Found:
    """Scores of every key: exact in the recent window, exact or estimated in front of it."""

    scores: Tensor  # float32 [rows, kv_heads, group, keys]  of the coded pages; -inf if not seen
    page_lse: Tensor  # float32 [rows, kv_heads, group, pages]
    lse: Tensor  # float32 [rows, kv_heads, group]
    near: Tensor  # float32 [rows, kv_heads, group, 128]  of the recent window
    stops: Tensor  # int64 [rows]  where it begins
    first: int  # page that the scores begin with

    @property
    def keys(self) -> int:
        return self.scores.shape[-1]


def _estimate(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> _Found:
    near, stops, first, last = _recent(query, cache, rows, scale)
    shape = near.shape[:3]
    if last == first:
        return _nothing(near, stops)
    scores, page_lse = scan(query, cache, rows, stops, first, last, scale)
    scores, page_lse = scores.view(*shape, -1), page_lse.view(*shape, -1)
    return _Found(scores, page_lse, page_lse.logsumexp(-1), near, stops, first)


def _score_all(query: Tensor, cache: LayerCache, rows: Rows, scale: float) -> _Found:
    near, stops, first, last = _recent(query, cache, rows, scale)
    if last == first:
        return _nothing(near, stops)
    keys = (last - first) * PAGE
    scores = score_run(query, cache, rows, rows.starts, stops, scale, first * PAGE, keys)
    page_lse = scores.unflatten(-1, (-1, PAGE)).logsumexp(-1)  # type: ignore[no-untyped-call]
    return _Found(scores, page_lse, page_lse.logsumexp(-1), near, stops, first)


def _recent(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, int, int]:
    """The recent window's scores, where it begins, and the pages in front of it, first and last."""
    recent = rows.recent_page
    first, last = torch.stack((rows.starts.min() // PAGE, recent.max())).tolist()
    stops = recent * PAGE
    near = score_run(query, cache, rows, rows.starts, rows.lengths, scale, stops, NEAR)
    return near, stops, first, max(first, last)


def _nothing(near: Tensor, stops: Tensor) -> _Found:
    """Nothing stands in front of the recent window."""
    none = near.new_empty(*near.shape[:3], 0)
    return _Found(none, none, near.new_full(near.shape[:3], -torch.inf), near, stops, 0)


def _left(found: _Found, selection: Selection) -> Tensor:
    return left_mass(
        found.scores, found.page_lse, found.lse, selection, found.stops, found.first * PAGE
    )


def _mean_value(left: Tensor, cache: LayerCache, rows: Rows, first: int) -> Tensor:
    """Means of the pages' values, weighted with `left` [rows, kv_heads, group, pages].

    Returns:
        float32 [rows, heads, head_dim]; 0 where nothing was left out.
    """
    count, kv_heads, group, pages = left.shape
    left = left / left.sum(-1, keepdim=True).clamp_min(1e-30)
    # All queries of a sequence and KV head side by side.
    left = left.view(rows.sequences, rows.queries, kv_heads, group, pages).permute(2, 0, 1, 3, 4)
    left = left.reshape(kv_heads * rows.sequences, -1, pages)
    values = cache.value_mean[:, rows.block_tables[:, first : first + pages]].flatten(0, 1)
    mean = torch.bmm(left.to(values.dtype), values)
    mean = mean.view(kv_heads, rows.sequences, rows.queries, group, -1).permute(1, 2, 0, 3, 4)
    return mean.reshape(count, kv_heads * group, -1).float()
