"""Attention of single query rows over their selected keys, read in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.cpu.keys import Keys, arrays, fall, numbers, place_of, slots_of
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.number import long_vectors
from kernels.cpu.scan import load_query
from kernels.cpu.vectors import add_rows, dot_rows, exponentials, greatest_score, log_sum

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.selection import Selection


def selected_attention(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.attention.selected_attention`."""
    output, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    weighted = selection.log_weight is not None
    own = torch.empty_like(lse) if weighted else lse
    weights = torch.empty(0, 0, 0) if selection.log_weight is None else selection.log_weight
    shared = (
        arrays(cache, rows), numbers(query), np.float32(scale),
        selection.indices.contiguous().numpy(), selection.counts.contiguous().numpy(), weighted,
        weights.contiguous().numpy(), output.numpy(), lse.numpy(), own.numpy(),
    )  # fmt: skip
    in_threads(_attend_rows, shared, selection.counts.numel())
    return output.to(query.dtype), lse, own


def _kernel(version: int) -> Any:
    """The kernel; see `sources` for the version."""

    @entry
    def attend_rows(
        keys: Keys, queries: Any, scale: Any, indices: Any, counts: Any, weighted: bool,
        weights: Any, output: Any, lse: Any, own: Any, _part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Rows and KV heads `start` to `stop`, head by head."""
        _ = version
        long_vectors()
        rows, kv_heads = counts.shape
        group, head_dim = queries.shape[1] // kv_heads, queries.shape[2]
        query = np.empty((group, head_dim), np.float32)
        # A key and its value side by side: what asks for the one ahead of time has the other, too.
        pairs = keys.kv.reshape(-1, 2 * head_dim)
        for unit in range(start, stop):
            head, row = unit // rows, unit % rows
            count = counts[row, head]
            load_query(queries, row, head * group, scale, query)
            slots = slots_of(keys, head, row, indices[row, head, :count])
            mass = np.empty((group, count), np.float32)
            dot_rows(query, pairs, slots, mass, 0)
            fall(keys, place_of(keys, head, row, 0), indices[row, head, :count], mass, 0)
            for place in range(count):
                slots[place] = 2 * slots[place] + 1
            for reader in range(group):
                number = head * group + reader
                if weighted:
                    own[row, number] = log_sum(mass[reader])
                    for place in range(count):
                        mass[reader, place] += weights[row, head, place]
                most = greatest_score(mass[reader])
                total = exponentials(mass[reader], most)
                lse[row, number] = np.log(total) + most  # -inf without keys
                part = np.float32(1) / total if total != 0 else np.float32(0)
                for place in range(count):
                    mass[reader, place] *= part
                mean = output[row, number]
                for channel in range(head_dim):
                    mean[channel] = 0
                add_rows(mass[reader], keys.kv, slots, mean)

    return attend_rows


_attend_rows = _kernel(sources())
