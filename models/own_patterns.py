"""The attention layer of a model whose heads see by patterns of their own.

There "dense" is all that the model's pattern shows. A request's fixed pattern is intersected with
it, as with a sliding window. To select by content is of no use: a head sees fewer keys than a
selection reads. Tokens that ask for it get all that the pattern shows, and the engine says so
(`own_pattern`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels.attention import Impl, selected_attention
from kernels.policy import Fixed
from kernels.prefill import pattern_lists, tile_attention
from kernels.selection import Selection
from kernels.tiles import TileSelection
from models.attention import Entry, TileEntry

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows, Segment
    from kernels.patterns.pattern import Pattern
    from models.attention import Recorder
    from models.step import StepInput


class _Where(NamedTuple):
    """What lists and selections depend on, which layers with the same patterns share."""

    patterns: tuple[Pattern, ...]
    place: int  # the rows or the segment, by identity: they last as long as the step


@dataclass(frozen=True, slots=True)
class PatternAttention:
    """Attention of one layer over the paged cache, each KV head by a pattern.

    Attributes:
        layer: number of the layer, for the recorder.
        scale: factor on the scores.
        patterns: causal ones, of each KV head.
        impl: backend of the attention ops.
    """

    layer: int
    scale: float
    patterns: tuple[Pattern, ...]
    impl: Impl = Impl.TORCH

    def __call__(
        self, query: Tensor, cache: LayerCache, step: StepInput, recorder: Recorder
    ) -> Tensor:
        """Code the pages that the step filled, then attend; see `models.attention`."""
        cache.code(step.filled)
        output = torch.empty_like(query)
        for run in step.dense:
            part = slice(run.first, run.first + run.segment.tokens)
            output[part] = self._segment(query[part], cache, run.segment, None, recorder)[0]
            tokens = torch.arange(part.start, part.stop, device=query.device)
            self._note(tokens, self._counts(run.segment, recorder), query.shape[1], recorder)
        for tiled in step.tiled:
            part = slice(tiled.first, tiled.first + tiled.segment.tokens)
            fixed = tiled.policy if isinstance(tiled.policy, Fixed) else None
            if self.layer < tiled.dense_layers:
                fixed = None
            output[part], density = self._segment(
                query[part], cache, tiled.segment, fixed, recorder
            )
            coverage = torch.ones_like(density) if fixed is None else _unknown(density)
            recorder.tiles.append(TileEntry(tiled.first, density, coverage))
        if step.alone is not None:
            place, rows = step.alone.tokens, step.alone.rows
            selection = self._select(rows, self.patterns, recorder)
            output[place] = self._attend(query[place], cache, rows, selection)[0]
            self._note(place, selection.counts, query.shape[1], recorder)
        for group in step.sparse:
            place, rows = group.tokens, group.rows
            every = self._select(rows, self.patterns, recorder)
            if not isinstance(group.policy, Fixed) or self.layer < group.dense_layers:
                output[place] = self._attend(query[place], cache, rows, every)[0]
                self._note(place, every.counts, query.shape[1], recorder)
                continue
            some = self._select(rows, self._within(group.policy), recorder)
            output[place], own = self._attend(query[place], cache, rows, some)
            coverage = _unknown(own)
            if group.policy.judged:
                coverage = (own - self._attend(query[place], cache, rows, every)[1]).exp()
            self._note(place, some.counts, query.shape[1], recorder, every.counts, coverage)
        return output

    def _within(self, policy: Fixed) -> tuple[Pattern, ...]:
        return tuple(pattern & policy.pattern for pattern in self.patterns)

    def _segment(
        self,
        query: Tensor,
        cache: LayerCache,
        segment: Segment,
        policy: Fixed | None,
        recorder: Recorder,
    ) -> tuple[Tensor, Tensor]:
        """Attention of consecutive tokens, and the share of the model's pattern read, [tiles]."""
        lists = own = self._lists(segment, self.patterns, recorder)
        if policy is not None:
            lists = self._lists(segment, self._within(policy), recorder)
        output, _, _ = tile_attention(query, cache, segment, lists, self.scale, self.impl)
        if lists is own:
            return output, query.new_ones(segment.tiles, dtype=torch.float64)
        read, seen = (one.attended(segment.start, segment.tokens).sum(1) for one in (lists, own))
        return output, read.double() / seen

    def _attend(
        self, query: Tensor, cache: LayerCache, rows: Rows, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        output, lse, _ = selected_attention(query, cache, rows, selection, self.scale, self.impl)
        return output, lse

    def _lists(
        self, segment: Segment, patterns: tuple[Pattern, ...], recorder: Recorder
    ) -> TileSelection:
        where = _Where(patterns, id(segment))
        if where not in recorder.shared:
            kinds = list(dict.fromkeys(patterns))
            lists = [pattern_lists(kind, segment, 1)[0] for kind in kinds]
            recorder.shared[where] = TileSelection.of_heads(lists, list(map(kinds.index, patterns)))
        found = recorder.shared[where]
        assert isinstance(found, TileSelection)
        return found

    def _select(self, rows: Rows, patterns: tuple[Pattern, ...], recorder: Recorder) -> Selection:
        where = _Where(patterns, id(rows))
        if where not in recorder.shared:
            kinds = list(dict.fromkeys(patterns))
            parts = [kind.select(rows.lengths, rows.starts, 1) for kind in kinds]
            recorder.shared[where] = Selection.of_heads(parts, list(map(kinds.index, patterns)))
        found = recorder.shared[where]
        assert isinstance(found, Selection)
        return found

    def _counts(self, segment: Segment, recorder: Recorder) -> Tensor:
        """Keys that each token of a segment sees, int64 [tokens, kv_heads]."""
        where = "counts", self.patterns, id(segment)
        if where not in recorder.shared:
            lists = self._lists(segment, self.patterns, recorder)
            recorder.shared[where] = lists.attended_by_query(segment.start, segment.tokens)
        found = recorder.shared[where]
        assert isinstance(found, torch.Tensor)
        return found

    def _note(
        self,
        tokens: Tensor,
        keys: Tensor,
        heads: int,
        recorder: Recorder,
        visible: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> None:
        """Note what rows read, [rows, kv_heads], and what they might have."""
        if coverage is None:
            coverage = torch.ones(len(keys), heads, device=keys.device)
        recorder.entries.append(
            Entry(
                layer=self.layer,
                tokens=tokens,
                keys=keys,
                visible=(keys if visible is None else visible).double().mean(-1),
                coverage=coverage,
                true_coverage=coverage if recorder.audit else None,
            )
        )


def _unknown(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)
