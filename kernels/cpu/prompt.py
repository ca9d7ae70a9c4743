"""A prompt's segment as numba takes it, and its values as tile registers do: transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kernels.cpu.amx import turn
from kernels.cpu.keys import numbers
from kernels.cpu.launch import entry, in_threads, sources
from kernels.cpu.number import long_vectors, number, stored
from kernels.page import PAGE
from kernels.tiles import SAMPLES, TURN
from kernels.torch_summaries import mean_spreads

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tiles import TileSelection


class Prompt(NamedTuple):
    """A segment, its cache and its lists as arrays; numbers are bfloat16 as uint16."""

    query: Any  # [tokens, heads, head_dim]
    kv: Any  # [kv_heads * pages * 64 * 2 * head_dim]
    table: Any  # int64 [pages]
    spread: Any  # float32 [kv_heads, tiles]  mean over the pages before
    starts: Any  # int64 [tiles, kv_heads]  see `TileSelection`, here and below
    counts: Any  # int32 [tiles, kv_heads]
    whole: Any  # int32 [tiles, kv_heads]
    listed: Any  # int32 [places]
    masks: Any  # int32 [places]
    bits: Any  # int64 [masks, 64]
    left: Any  # int64 [tiles, kv_heads, words]; no words: none
    read: Any  # bool [kv_heads, pages]  by any tile
    # What stands for 64 pages each: their means and of each some keys, [kv_heads, 1 + SAMPLES,
    # words * 64, head_dim]; and values: likewise, and how far the mean is from those keys'.
    key: Any
    value: Any
    start: int  # position of the first token
    pages: int  # of each KV head in the cache
    scale: Any  # float32


def prompt_of(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> Prompt:
    """A segment and its lists, and what stands for the pages that are left."""
    table, kv_heads = segment.block_table, cache.kv_heads
    tiles = selection.counts.shape[0]
    left = selection.left
    if left is None or len(table) == 1:
        left = selection.starts.new_empty(tiles, kv_heads, 0)
    words = left.shape[2]
    # Where there is no page, nothing is seen; but nothing times what is no number is none, either.
    key, value = (
        np.zeros((kv_heads, kinds, words * PAGE, cache.head_dim), np.uint16)
        for kinds in (1 + SAMPLES, 2 + SAMPLES)
    )
    if words:
        means = numbers(cache.key_mean), numbers(cache.value_mean)
        shared = (numbers(cache.kv), *means, table.numpy(), key, value)
        in_threads(_gather, shared, kv_heads * (len(table) - 1))
    number_of = torch.arange(selection.counts.numel()) % kv_heads
    counts = selection.counts.flatten().long()
    read = torch.zeros(kv_heads, len(table), dtype=torch.bool)
    # Lists may lie in any order in `pages`: each place's own list is found by its start.
    place = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    where = selection.starts.flatten().repeat_interleave(counts) + place
    read[number_of.repeat_interleave(counts), selection.pages[where].long()] = True
    return Prompt(
        query=numbers(query),
        kv=numbers(cache.kv.view(-1)),
        table=table.numpy(),
        spread=mean_spreads(cache, segment).contiguous().numpy(),
        starts=selection.starts.contiguous().numpy(),
        counts=selection.counts.contiguous().numpy(),
        whole=selection.whole.contiguous().numpy(),
        listed=selection.pages.numpy(),
        masks=selection.masks.numpy(),
        bits=selection.bits.numpy(),
        left=left.contiguous().numpy(),
        read=read.numpy(),
        key=key,
        value=value,
        start=segment.start,
        pages=cache.kv.shape[1],
        scale=np.float32(scale),
    )


def turned_values(prompt: Prompt) -> Any:
    """The values that are read, and all that stand for pages, transposed.

    Returns:
        uint16 [kv_heads * (pages + kinds * words), head_dim * 64], of a KV head its pages first.
    """
    kv_heads, kinds = prompt.value.shape[:2]
    pages = len(prompt.table) + kinds * prompt.left.shape[2]
    values = np.empty((kv_heads * pages, prompt.query.shape[2] * PAGE), np.uint16)
    in_threads(_turn_values, (prompt, values), len(values))
    return values


def _kernels(version: int) -> tuple[Any, Any]:
    """The kernels; see `sources` for the version."""

    @entry
    def gather(
        kv: Any, key_mean: Any, value_mean: Any, table: Any, key: Any, value: Any, _part: int,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        """What stands for pages `start` to `stop` of all KV heads; see `Prompt`."""
        _ = version
        long_vectors()
        pages, head_dim = len(table) - 1, key.shape[3]
        for unit in range(start, stop):
            head, page = unit // pages, unit % pages
            slot = table[page]
            key[head, 0, page] = key_mean[head, slot]
            value[head, 0, page] = value_mean[head, slot]
            total = np.zeros(head_dim, np.float32)
            for sample in range(SAMPLES):
                place = (page * TURN + sample * (64 // SAMPLES)) % 64
                key[head, 1 + sample, page] = kv[head, slot, place, 0]
                value[head, 1 + sample, page] = kv[head, slot, place, 1]
                for channel in range(head_dim):
                    total[channel] += number(kv[head, slot, place, 1, channel])
            off = value[head, 1 + SAMPLES, page]
            for channel in range(head_dim):
                less = total[channel] / np.float32(SAMPLES)
                off[channel] = stored(number(value_mean[head, slot, channel]) - less, off)

    @entry
    def turn_values(prompt: Prompt, values: Any, _part: int, start: int, stop: int) -> None:
        """Transpose the values that are read, and all that stand for pages."""
        _ = version
        long_vectors()
        head_dim, pages, words = prompt.query.shape[2], len(prompt.table), prompt.left.shape[2]
        each = pages + prompt.value.shape[1] * words
        end = prompt.start + prompt.query.shape[0]
        pairs = np.empty((32, head_dim), np.uint32)
        listed, others = prompt.kv.reshape(-1, 2, head_dim), prompt.value.reshape(-1, head_dim)
        for number_of in range(start, stop):
            head, page = number_of // each, number_of % each
            if page < pages and not prompt.read[head, page]:
                continue
            at = (head * prompt.pages + prompt.table[min(page, pages - 1)]) * 64
            other = (head * (each - pages) + page - pages) * 64
            for pair in range(32):
                if page >= pages:
                    one, two = others[other + 2 * pair], others[other + 2 * pair + 1]
                else:
                    one, two = listed[at + 2 * pair, 1], listed[at + 2 * pair + 1, 1]
                for channel in range(head_dim):
                    pairs[pair, channel] = np.uint32(one[channel]) | np.uint32(
                        two[channel]
                    ) << np.uint32(16)
                if page < pages:  # behind the last key anything may lie
                    there = end - page * 64 - 2 * pair
                    if there < 2:
                        keep = np.uint32(0xFFFF) if there == 1 else np.uint32(0)
                        for channel in range(head_dim):
                            pairs[pair, channel] &= keep
            for channel in range(0, head_dim, 16):
                for pair in range(0, 32, 16):
                    turn(
                        pairs, pair * head_dim + channel, 4 * head_dim,
                        values, (number_of * head_dim + channel) * 64 + 2 * pair, 128,
                    )  # fmt: skip

    return gather, turn_values


_gather, _turn_values = _kernels(sources())
