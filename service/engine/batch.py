"""From scheduled work to the model's input: groups tokens by how they attend."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.cache import Rows, Segment
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic, Fixed, Pages
from models.step import DenseGroup, DenseRows, SparseGroup, StepInput, TileGroup
from service.engine.sequence import Mode, Sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.engine.scheduler import Work
    from service.engine.types import SparsityParams


def policy_of(sequence: Sequence, position: int) -> Dynamic | Fixed:
    """The kernel's policy for the token at `position`, whose mode is a sparse one."""
    if sequence.mode(position) is Mode.DYNAMIC:
        return dynamic_policy(sequence.wanted(position))
    wanted = sequence.request.sparsity
    # A fallback is not judged: that takes the same kernels as the selection that failed, or as the
    # one that is saved.
    return Fixed(Pattern.parse(wanted.pattern), judged=wanted.policy == "fixed")


def prefill_policy(wanted: SparsityParams) -> Pages | Fixed:
    """The kernel's policy for a prompt's tokens before its tail, where they are not dense."""
    if wanted.prefill == "dynamic":
        return Pages(wanted.prefill_coverage)
    return Fixed(Pattern.parse(wanted.pattern))


def dynamic_policy(wanted: SparsityParams) -> Dynamic:
    """The kernel's policy for tokens that attend dynamically."""
    return Dynamic(
        coverage=wanted.coverage,
        min_keys=wanted.min_keys,
        max_keys=wanted.max_keys,
        sampled=wanted.sampled,
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive tokens of one sequence in one mode, under one policy."""

    sequence: Sequence
    mode: Mode
    start: int  # position of the first token
    stop: int
    first: int  # place of the first token in the step


def build_step(work: Iterable[Work], device: torch.device) -> StepInput:
    """The model's input for one step.

    Tokens stand in the order of `work`. Consecutive dense tokens become a segment, single ones
    share a group; sparse ones of the same policy, dense layers and number a sequence share one too.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    filled: list[int] = []
    dense: list[DenseGroup] = []
    alone: list[_Span] = []
    tiles: list[TileGroup] = []
    sparse: dict[tuple[Dynamic | Fixed, int, int], list[_Span]] = defaultdict(list)
    for item in work:
        sequence = item.sequence
        for span in _spans(item, len(tokens)):
            count = span.stop - span.start
            if span.mode is not Mode.DENSE and span.start < sequence.request.tail_start:
                wanted = sequence.request.sparsity
                segment = Segment.of(sequence.pages, span.start, count, device)
                tiles.append(
                    TileGroup(segment, span.first, prefill_policy(wanted), wanted.dense_layers)
                )
            elif span.mode is Mode.DENSE and count == 1:
                alone.append(span)
            elif span.mode is Mode.DENSE:
                segment = Segment.of(sequence.pages, span.start, count, device)
                dense.append(DenseGroup(segment, span.first))
            else:
                policy = policy_of(sequence, span.start)
                sparse[policy, sequence.request.sparsity.dense_layers, count].append(span)
        # Page by page: token by token would take a large part of a long prompt's step.
        first, last = item.start // PAGE, -(-item.stop // PAGE)
        of_pages = [
            slot
            for page in sequence.pages[first:last]
            for slot in range(page * PAGE, (page + 1) * PAGE)
        ]
        slots += of_pages[item.start - first * PAGE : item.stop - first * PAGE]
        filled += sequence.pages[first : item.stop // PAGE]
        positions += range(item.start, item.stop)
        tokens += sequence.tokens[item.start : item.stop]
    return StepInput(
        token_ids=_int64(tokens, device),
        positions=_int64(positions, device),
        slots=_int64(slots, device),
        filled=_int64(filled, device),
        dense=tuple(dense),
        alone=DenseRows(*_rows(alone, device)) if alone else None,
        sparse=tuple(
            SparseGroup(*_rows(spans, device), policy, dense_layers)
            for (policy, dense_layers, _), spans in sparse.items()
        ),
        tiled=tuple(tiles),
    )


def _spans(item: Work, first: int) -> list[_Span]:
    sequence = item.sequence
    tail = max(item.start, min(item.stop, sequence.request.tail_start))
    # A prompt's tokens before its tail attend alike page by page: no need to ask for each.
    asked = [*range(item.start, tail, PAGE), *range(tail, item.stop)]
    spans: list[_Span] = []
    start, mode, wanted = item.start, sequence.mode(item.start), sequence.wanted(item.start)
    for here in asked[1:]:
        current, budget = sequence.mode(here), sequence.wanted(here)
        # Behind the tail's start tokens attend as rows, before it as tiles.
        if current is not mode or budget is not wanted or here == tail:
            spans.append(_Span(sequence, mode, start, here, first + start - item.start))
            start, mode, wanted = here, current, budget
    spans.append(_Span(sequence, mode, start, item.stop, first + start - item.start))
    return spans


def _rows(spans: list[_Span], device: torch.device) -> tuple[Rows, torch.Tensor]:
    """Where the keys of some spans lie, and their tokens' places in the step."""
    ends = [-(-span.stop // PAGE) for span in spans]
    tables = np.zeros((len(spans), max(ends)), dtype=np.int64)  # from lists torch takes far longer
    for row, (span, end) in enumerate(zip(spans, ends, strict=True)):
        tables[row, :end] = span.sequence.pages[:end]
    lengths = [n for span in spans for n in range(span.start + 1, span.stop + 1)]
    places = [span.first + i for span in spans for i in range(span.stop - span.start)]
    rows = Rows(
        block_tables=torch.from_numpy(tables).to(device),
        lengths=_int64(lengths, device),
        starts=torch.zeros(len(lengths), dtype=torch.int64, device=device),
    )
    return rows, _int64(places, device)


def _int64(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
