"""Which pages a prompt's tiles read, in a processor's tile registers; see `kernels.prefill`.

As in `kernels.cpu.block` scores stand transposed: a page's in a row, 32 queries of a head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.cpu.amx import BLOCK, configure, configured, multiply, shape, turn
from kernels.cpu.block import LOG2E
from kernels.cpu.keys import numbers
from kernels.cpu.launch import entry, in_threads, jit, sources
from kernels.cpu.number import long_vectors, number, small_power
from kernels.page import PAGE
from kernels.torch_summaries import mean_spreads

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment

_ZERO, _NONE = np.float32(0), np.float32(-np.inf)


class Asked(NamedTuple):
    """A segment and its cache as arrays; numbers are bfloat16 as uint16."""

    query: Any  # [tokens, heads, head_dim]
    kv: Any  # [kv_heads * pages * 64 * 2 * head_dim]
    means: Any  # [kv_heads, words * 64, head_dim]  of the keys of each page, in their order
    table: Any  # int64 [pages]
    spread: Any  # float32 [kv_heads, tiles]  mean over the pages before
    start: int  # position of the first token
    pages: int  # of each KV head in the cache
    scale: float
    least: float
    asked: int


def read_pages(
    query: Tensor, cache: LayerCache, segment: Segment, least: float, scale: float, asked: int
) -> Tensor:
    """The pages that each tile reads: bool [tiles, kv_heads, pages]; bfloat16."""
    assert asked * BLOCK == PAGE, "a tile's queries of a head make one block"
    table, kv_heads = segment.block_table, cache.kv_heads
    means = cache.key_mean[:, table[:-1]]
    given = Asked(
        query=numbers(query),
        kv=numbers(cache.kv.view(-1)),
        means=numbers(F.pad(means, (0, 0, 0, -means.shape[1] % PAGE))),
        table=table.numpy(),
        spread=mean_spreads(cache, segment).contiguous().numpy(),
        start=segment.start,
        pages=cache.kv.shape[1],
        scale=scale,
        least=least,
        asked=asked,
    )
    tiles = len(table) - segment.start // PAGE
    read = torch.zeros(tiles, kv_heads, len(table), dtype=torch.bool)
    threads = torch.get_num_threads()
    in_threads(_read_pages, (given, shape(), threads, read.numpy()), threads)
    for tile in {0, tiles - 1}:  # a tile of which no query is asked reads all
        begin = (segment.start // PAGE + tile) * PAGE
        stop = min(segment.start + segment.tokens, begin + PAGE)
        if stop // asked == max(segment.start, begin) // asked:
            read[tile] = True
    return read


@jit
def _load(given: Asked, tile: int, head: int, query: Any, rows: Any, size: Any) -> None:
    """A tile's asked queries of a head, and |q|^2; -1 of one that is not there."""
    long_vectors()
    tokens, head_dim = given.query.shape[0], given.query.shape[2]
    first = (given.start // 64 + tile) * 64 - given.start + given.asked - 1
    for row in range(32):
        token, square = first + row * given.asked, _ZERO
        if 0 <= token < tokens:
            for channel in range(head_dim):
                value = given.query[token, head, channel]
                rows[row, channel] = value
                square += number(value) * number(value)
            size[row] = square
        else:
            rows[row, :] = 0
            size[row] = np.float32(-1)
    for channel in range(0, head_dim, 32):
        for row in range(0, 32, 16):
            turn(
                rows, row * head_dim + channel, 2 * head_dim,
                query, channel * 16 + row, 128,
            )  # fmt: skip


@jit
def _gather_mass(score: Any, scale: Any, more: Any, most: Any, total: Any) -> None:
    """Add 2 ** (score [keys, 32] * scale + more [32]) to a total of 2 ** most."""
    long_vectors()
    peak, shift, added = (
        np.full(32, _NONE, np.float32), np.empty(32, np.float32), np.zeros(32, np.float32),
    )  # fmt: skip
    for key in range(score.shape[0]):
        for row in range(32):
            one = score[key, row]
            peak[row] = one if one > peak[row] else peak[row]
    for row in range(32):
        high = peak[row] * scale + more[row]
        high = high if high > most[row] else most[row]
        base = high if high > _NONE else _ZERO
        total[row] *= small_power(most[row] - base)
        most[row], shift[row] = high, more[row] - base
    for key in range(score.shape[0]):
        for row in range(32):
            added[row] += small_power(score[key, row] * scale + shift[row])
    for row in range(32):
        total[row] += added[row]


@jit
def _mark(score: Any, enough: Any, read: Any) -> None:
    """Mark pages of which a score [pages, 32] is not less than `enough` [32]."""
    long_vectors()
    for page in range(score.shape[0]):
        hits = 0
        for row in range(32):
            hits += 0 if score[page, row] < enough[row] else 1  # what is no number is read
        read[page] |= hits > 0


def _kernel(version: int) -> Any:
    """The kernel; see `sources` for the version."""

    @entry
    def mark_pages(
        given: Asked, tiled: Any, threads: int, read: Any, _part: int, start: int, stop: int
    ) -> None:
        """Every `threads`-th tile of a query head, from numbers `start` to `stop` on."""
        _ = version
        tiles, kv_heads, _pages = read.shape
        heads, head_dim = given.query.shape[1:]
        query, rows = np.empty(head_dim * 16, np.uint32), np.empty((32, head_dim), np.uint16)
        own, score = (
            np.empty((64, 32), np.float32),
            np.empty((given.means.shape[1], 32), np.float32),
        )
        size, more, most, total, enough = (
            np.empty(32, np.float32), np.empty(32, np.float32), np.empty(32, np.float32),
            np.empty(32, np.float32), np.empty(32, np.float32),
        )  # fmt: skip
        scale, here = np.float32(given.scale * LOG2E), np.zeros(1, np.int64)
        before = np.empty(64, np.uint8)
        configured(before)
        configure(tiled)
        for first in range(start, stop):
            # All heads of a group in one thread: they mark the same pages.
            for unit in range(first, tiles * kv_heads, threads):
                group, tile = unit // tiles, unit % tiles
                past = given.start // 64 + tile
                marked = read[tile, group]
                for head in range(group * (heads // kv_heads), (group + 1) * (heads // kv_heads)):
                    _load(given, tile, head, query, rows, size)
                    at = (group * given.pages + given.table[past]) * 64 * 2 * head_dim
                    for key in range(0, 64, 32):
                        multiply(
                            given.kv, at + key * 2 * head_dim, here, 1, 4 * head_dim,
                            head_dim // 32, query, 0, own, key * 32, 0,
                        )  # fmt: skip
                    for key in range(64):
                        for row in range(32):
                            if key > row * given.asked + given.asked - 1:
                                own[key, row] = _NONE
                    at = group * given.means.shape[1] * head_dim
                    for page in range(0, past, 32):
                        multiply(
                            given.means, at + page * head_dim, here, 1, 2 * head_dim,
                            head_dim // 32, query, 0, score, page * 32, 0,
                        )  # fmt: skip
                    more[:], most[:], total[:] = _ZERO, _NONE, _ZERO
                    _gather_mass(own, scale, more, most, total)
                    for row in range(32):
                        variance = size[row] * given.scale**2 * given.spread[group, tile]
                        more[row] = math.log2(64) + variance / 2 * LOG2E
                    _gather_mass(score[:past], scale, more, most, total)
                    for row in range(32):
                        variance = size[row] * given.scale**2 * given.spread[group, tile]
                        error = np.log(np.expm1(variance) / 64) / 2
                        bound = np.log(np.float64(total[row]) * given.least) - error
                        bound = (bound * LOG2E + most[row] - more[row]) / scale
                        bound = bound if given.least > 0 else -np.inf
                        enough[row] = bound if size[row] != -1 else np.inf
                    _mark(score[:past], enough, marked[:past])
                if past > 0:
                    marked[0] = marked[past - 1] = True
        configure(before)

    return mark_pages


_read_pages = _kernel(sources())
