"""The attention layer: where every query decides where to look, and looks there.

Read `LayerAttention.__call__` first. Keys are written, pages that filled are summarised, and then
each group of tokens attends: densely, by a fixed pattern, or to what `kernels.dynamic` selects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kernels import dynamic
from kernels.attention import Impl, dense_attention, selected_attention
from kernels.policy import Dynamic

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache
    from models.step import SparseGroup, StepInput


@dataclass(frozen=True, slots=True)
class Entry:
    """What the sparse rows of one group looked at in one layer."""

    layer: int
    tokens: Tensor  # int64 [rows]  place of each row in the step
    keys: Tensor  # int64 [rows, kv_heads]  keys attended
    visible: Tensor  # int64 [rows]  keys causally visible
    coverage: Tensor  # [rows, heads]  estimated share of the attention mass on them


@dataclass(frozen=True, slots=True)
class Recorder:
    """Takes note of what a step's sparse rows looked at, layer by layer."""

    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Attention of one layer over the paged cache.

    Attributes:
        layer: number of the layer, for the recorder.
        scale: factor on the scores.
        window: keys a token may see under the model's own sliding window; None for all.
        impl: backend of the attention ops.
    """

    layer: int
    scale: float
    window: int | None = None
    impl: Impl = Impl.TORCH

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cache: LayerCache,
        step: StepInput,
        recorder: Recorder,
    ) -> Tensor:
        """Write the step's keys, then attend.

        Args:
            query: [tokens, heads, head_dim], rotated.
            keys: [tokens, kv_heads, head_dim], rotated.
            values: [tokens, kv_heads, head_dim].
            cache: this layer's cache.
            step: how each token attends.
            recorder: takes note of what sparse rows looked at.

        Returns:
            [tokens, heads, head_dim].
        """
        cache.write(step.slots, keys, values)
        cache.summarise(step.filled)
        output = torch.empty_like(query)
        for group in step.dense:
            part = slice(group.first, group.first + group.segment.tokens)
            output[part] = dense_attention(
                query[part], cache, group.segment, self.scale, self.window, self.impl
            )
        for rows in step.sparse:
            output[rows.tokens] = self._selected(query[rows.tokens], cache, rows, recorder)
        return output

    def _selected(
        self, query: Tensor, cache: LayerCache, group: SparseGroup, recorder: Recorder
    ) -> Tensor:
        rows = group.rows.within(self.window)
        if isinstance(group.policy, Dynamic):
            choice = dynamic.select(query, cache, rows, group.policy, self.scale)
        else:
            selection = group.policy.pattern.select(
                rows.lengths.tolist(), rows.starts.tolist(), cache.kv_heads, query.device
            )
            choice = dynamic.rest_of(query, cache, rows, selection, self.scale)
        output, lse = selected_attention(
            query, cache, rows, choice.selection, self.scale, self.impl
        )
        counts = choice.selection.counts
        recorder.entries.append(
            Entry(self.layer, group.tokens, counts, rows.visible, choice.coverage(lse))
        )
        return output
