"""The attention layer: where every query decides where to look, and looks there.

Read `LayerAttention.__call__` first. Pages that filled are coded, and then each group of tokens
attends: densely, by a fixed pattern, or to what `kernels.dynamic` or `kernels.prefill` selects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kernels import dynamic, judge
from kernels.attention import Impl, dense_attention, dense_decode, selected_attention
from kernels.budget import SAMPLE
from kernels.cache import Rows
from kernels.dynamic import Attended
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.patterns.window import Window
from kernels.policy import Dynamic, Pages
from kernels.prefill import (
    causal_density,
    choose,
    of_tiles,
    pattern_lists,
    tile_attention,
    visible_pairs,
)
from kernels.timing import Phases
from models.explain import glance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from kernels.cache import LayerCache
    from kernels.policy import Fixed
    from kernels.selection import Selection
    from models.explain import Glance, Wanted
    from models.step import SparseGroup, StepInput, TileGroup

KEY_BYTES = 12
"""Of a selected key: its position, and the log of what it stands for."""
SELECTION_BYTES = 32 << 20
"""Most bytes of one piece's selection: a request for a million keys a row is served in pieces."""
GPU_SELECTION_BYTES = 512 << 20
"""The same where a place is kept for every key that may be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the sparse rows of one group looked at in one layer."""

    layer: int
    tokens: Tensor  # int64 [rows]  place of each row in the step
    keys: Tensor  # int64 [rows, kv_heads]  keys attended
    visible: Tensor  # [rows]  keys that the model lets them see, mean over KV heads
    coverage: Tensor  # [rows, heads]  estimated share of the attention mass on them
    true_coverage: Tensor | None  # [rows, heads]  the exact share, in an audited step


@dataclass(frozen=True, slots=True)
class TileEntry:
    """What one group of tiles looked at in one layer."""

    first: int  # place of the group's first token in the step
    density: Tensor  # [tiles]  keys read over keys visible, of its tokens and all KV heads
    coverage: Tensor  # [tiles]  estimated share of the mass on them, mean over heads; nan: unknown


@dataclass(frozen=True, slots=True)
class Recorder:
    """Takes note of what a step's sparse rows looked at, layer by layer."""

    phases: Phases = field(default_factory=Phases)
    entries: list[Entry] = field(default_factory=list)
    tiles: list[TileEntry] = field(default_factory=list)
    # What layers of the step compute once for all of them (`models.own_patterns`).
    shared: dict[object, object] = field(default_factory=dict)
    explain: Mapping[int, Wanted] = field(default_factory=dict)  # by place in the step
    glances: list[Glance] = field(default_factory=list)  # of these, layer by layer

    @property
    def audit(self) -> bool:
        """Whether to also read every key, to know the exact coverage: in timed steps."""
        return self.phases.on


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Attention of one layer over the paged cache.

    Attributes:
        layer: number of the layer, for the recorder.
        scale: factor on the scores.
        window: keys a token may see under the model's own sliding window; None for all.
        impl: backend of the attention ops.
        slopes: [heads], what distance takes from the scores (`kernels.alibi`); None: nothing.
    """

    layer: int
    scale: float
    window: int | None = None
    impl: Impl = Impl.TORCH
    slopes: Tensor | None = None

    def __call__(
        self,
        query: Tensor,
        cache: LayerCache,
        step: StepInput,
        recorder: Recorder,
    ) -> Tensor:
        """Code the pages that the step filled, then attend.

        Args:
            query: [tokens, heads, head_dim], rotated.
            cache: this layer's cache, the step's keys and values in it.
            step: how each token attends.
            recorder: takes note of what sparse rows looked at.

        Returns:
            [tokens, heads, head_dim].
        """
        cache.code(step.filled)
        if step.turn is not None:
            step.turn.take(self.layer)
        # Here, so that whoever allocates caches need not know of it.
        cache = cache.biased(self.slopes)
        output = torch.empty_like(query)
        for run in step.dense:
            part = slice(run.first, run.first + run.segment.tokens)
            output[part] = dense_attention(
                query[part], cache, run.segment, self.scale, self.window, self.impl
            )
        if step.alone is not None:
            place, rows = step.alone.tokens, step.alone.rows.within(self.window)
            output[place], _ = dense_decode(query[place], cache, rows, self.scale, self.impl)
        for tiled in step.tiled:
            part = slice(tiled.first, tiled.first + tiled.segment.tokens)
            output[part] = self._tiled(query[part], cache, tiled, recorder)
        if recorder.explain:
            self._explain_dense(query, cache, step, recorder)
        for group in step.sparse:
            output[group.tokens] = self._selected(query[group.tokens], cache, group, recorder)
        return output

    def _tiled(
        self, query: Tensor, cache: LayerCache, group: TileGroup, recorder: Recorder
    ) -> Tensor:
        segment, policy, scale, impl = group.segment, group.policy, self.scale, self.impl
        windowed = self.window is not None and isinstance(policy, Pages)
        if self.layer < group.dense_layers or windowed:
            # A sliding window has few keys to leave out.
            every = query.new_ones(segment.tiles, dtype=torch.float64)
            recorder.tiles.append(TileEntry(group.first, every, every))
            return dense_attention(query, cache, segment, scale, self.window, impl)
        if isinstance(policy, Pages):
            selection = choose(query, cache, segment, policy.least, scale, impl)
        else:
            pattern = policy.pattern
            if self.window is not None:
                pattern = pattern & Pattern(Window(self.window))
            selection, pairs = pattern_lists(pattern, segment, cache.kv_heads)
        output, lse, own = tile_attention(query, cache, segment, selection, scale, impl)
        if isinstance(policy, Pages):
            density = causal_density(selection, segment)
            coverage = of_tiles((own - lse).double().exp().mean(1), segment)
        else:
            density = pairs / visible_pairs(segment, self.window)
            coverage = torch.full_like(density, torch.nan)
        recorder.tiles.append(TileEntry(group.first, density, coverage))
        return output

    def _selected(
        self, query: Tensor, cache: LayerCache, group: SparseGroup, recorder: Recorder
    ) -> Tensor:
        rows = group.rows.within(self.window)
        if self.layer < group.dense_layers:
            output, lse = dense_decode(query, cache, rows, self.scale, self.impl)
            keys = rows.visible[:, None].expand(-1, cache.kv_heads)
            certain = torch.ones_like(lse).where(lse.isfinite(), torch.nan)
            exact = certain if recorder.audit else None
            self._explain(query, cache, rows, group.tokens, None, recorder)
            recorder.entries.append(
                Entry(self.layer, group.tokens, keys, rows.visible, certain, exact)
            )
            return output
        output = torch.empty_like(query)
        for part, piece in rows.pieces(self._rows_at_once(cache, rows, group.policy)):
            found = self._attend(query[part], cache, piece, group.policy, recorder.phases)
            output[part] = found.output
            self._explain(
                query[part], cache, piece, group.tokens[part], (group.policy, found), recorder
            )
            exact = None
            if recorder.audit:
                exact = judge.true_coverage(
                    query[part], cache, piece, found.selection, found.own, self.scale, self.impl
                )
            recorder.entries.append(
                Entry(
                    layer=self.layer,
                    tokens=group.tokens[part],
                    keys=found.keys,
                    visible=piece.visible,
                    coverage=found.coverage,
                    true_coverage=exact,
                )
            )
        return output

    def _explain_dense(
        self, query: Tensor, cache: LayerCache, step: StepInput, recorder: Recorder
    ) -> None:
        for run in step.dense:
            segment = run.segment
            for at in recorder.explain:
                if run.first <= at < run.first + segment.tokens:
                    length = segment.block_table.new_tensor([segment.start + at - run.first + 1])
                    row = Rows(segment.block_table[None], length, torch.zeros_like(length))
                    row, token = row.within(self.window), length.new_tensor([at])
                    self._explain(query[token], cache, row, token, None, recorder)
        if step.alone is not None:
            place, rows = step.alone.tokens, step.alone.rows.within(self.window)
            self._explain(query[place], cache, rows, place, None, recorder)

    def _explain(
        self,
        query: Tensor,
        cache: LayerCache,
        rows: Rows,
        tokens: Tensor,
        how: tuple[Dynamic | Fixed, Attended] | None,
        recorder: Recorder,
    ) -> None:
        """Note what those of the rows attended to that are to be explained.

        Args:
            query: [rows, heads, head_dim].
            cache: this layer's cache.
            rows: where their keys lie.
            tokens: int64 [rows], their places in the step.
            how: the policy, and what it found; None where every key was read.
            recorder: takes the notes.
        """
        for place, wanted in recorder.explain.items():
            if not wanted.takes(self.layer):
                continue
            for at in (tokens == place).nonzero()[:, 0]:
                one, row = query[at][None], rows.only(at[None])
                selection: Selection | None = None
                if how is not None:
                    policy, found = how
                    if found.selection is not None:
                        selection = found.selection.rows(slice(int(at), int(at) + 1))
                    elif isinstance(policy, Dynamic):  # the same keys: they depend on the row alone
                        selection = dynamic.select(
                            one, cache, row, policy, self.scale, impl=self.impl
                        )
                recorder.glances.append(
                    glance(wanted, self.layer, place, one, cache, row, selection, self.scale)
                )

    def _attend(
        self,
        query: Tensor,
        cache: LayerCache,
        rows: Rows,
        policy: Dynamic | Fixed,
        phases: Phases,
    ) -> Attended:
        scale, impl = self.scale, self.impl
        if isinstance(policy, Dynamic):
            return dynamic.attend(query, cache, rows, policy, scale, phases, impl)
        selection = policy.pattern.select(rows.lengths, rows.starts, cache.kv_heads)
        with phases.time("attend", query.device):
            output, lse, own = selected_attention(query, cache, rows, selection, scale, impl)
        coverage = torch.full_like(lse, torch.nan)
        if policy.judged:
            coverage = judge.estimated_coverage(
                query, cache, rows, selection, lse, own, scale, impl
            )
        return Attended(output, lse, own, coverage, selection.counts, selection)

    def _rows_at_once(self, cache: LayerCache, rows: Rows, policy: Dynamic | Fixed) -> int:
        """Rows whose selections together stay small, however many keys each may hold."""
        # By the tables' room: a GPU's answer to how many keys there are would be waited for.
        keys, most = rows.block_tables.shape[1] * PAGE, GPU_SELECTION_BYTES
        if self.impl is not Impl.TRITON:
            keys, most = min(keys, self.window or keys), SELECTION_BYTES
            if isinstance(policy, Dynamic):
                keys = min(keys, max(policy.max_keys, 2 * PAGE + policy.sinks + SAMPLE))
        return max(1, most // (KEY_BYTES * cache.kv_heads * keys))
