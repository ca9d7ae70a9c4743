"""Attention of a prompt's tiles over the pages they read, in a processor's tile registers.

A tile's queries of a KV head read its list block by block (`kernels.cpu.block`), and then what
stands for the pages that are left (`kernels.cpu.prompt`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernels.cpu.amx import configure, configured, shape
from kernels.cpu.block import (
    AT_ONCE,
    LOG2E,
    Work,
    add_values,
    hide_keys,
    load_queries,
    score_keys,
    write_lse,
    write_output,
)
from kernels.cpu.launch import entry, in_threads, jit, sources
from kernels.cpu.number import long_vectors
from kernels.cpu.prompt import prompt_of, turned_values
from kernels.page import PAGE
from kernels.tiles import ALIKE, SAMPLES

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.cpu.prompt import Prompt
    from kernels.tiles import TileSelection

_HALF, _NONE, _ALIKE = np.float32(0.5), np.float32(-np.inf), np.float32(ALIKE)
_PAGES, _EACH = np.float32(math.log2(PAGE)), np.float32(math.log2(PAGE / SAMPLES))

_TOGETHER = 16
"""Pages that a block reads on end: as many as stay near while a tile's other blocks read them."""


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.prefill.tile_attention`; bfloat16, and whole blocks of channels."""
    prompt = prompt_of(query.contiguous(), cache, segment, selection, scale)
    values = turned_values(prompt)
    output, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    own = torch.empty_like(lse)
    threads = torch.get_num_threads()
    outputs = output.numpy(), lse.numpy(), own.numpy()
    in_threads(_attend_tiles, (prompt, values, shape(), threads, *outputs), threads)
    return output.to(query.dtype), lse, own


@jit
def _read(prompt: Prompt, values: Any, tile: int, head: int, work: Work) -> None:
    """The pages of a list."""
    head_dim, pages = prompt.query.shape[2], len(prompt.table)
    turned = head * (pages + prompt.value.shape[1] * prompt.left.shape[2])
    nothing = np.zeros(32, np.float32)
    start, count, whole = (
        prompt.starts[tile, head], prompt.counts[tile, head], prompt.whole[tile, head],
    )  # fmt: skip
    for first in range(0, count, _TOGETHER):
        for block in range(work.query.shape[0]):
            stop = min(first + _TOGETHER, count)
            for begin in range(first, stop, AT_ONCE):
                many = min(AT_ONCE, stop - begin)
                for nth in range(many):
                    place = start + begin + nth
                    page = prompt.listed[place]
                    at = (head * prompt.pages + prompt.table[page]) * 64 * 2 * head_dim
                    score_keys(work, block, nth, prompt.kv, at, 4 * head_dim)
                    if begin + nth >= whole:
                        hide_keys(work, nth, prompt.bits[prompt.masks[place]], block % 2 * 32)
                    work.value[nth] = (turned + page) * head_dim * 64
                add_values(work, block, many, values, prompt.scale * LOG2E, nothing, True)


@jit
def _stand_in(prompt: Prompt, values: Any, tile: int, head: int, work: Work) -> None:
    """What stands for the pages that are left; see `kernels.reference_tiles._left`."""
    long_vectors()
    head_dim, pages, words = prompt.query.shape[2], len(prompt.table), prompt.left.shape[2]
    kinds = prompt.value.shape[1]
    turned = head * (pages + kinds * words) + pages
    past = prompt.start // 64 + tile
    rough, plain, fine = (
        np.empty(32, np.float32), np.empty(32, np.float32), np.empty(32, np.float32),
    )  # fmt: skip
    for block in range(work.query.shape[0]):
        many_alike = 0
        for row in range(32):
            variance = work.variance[block, row]
            alike = variance < _ALIKE
            many_alike += alike
            rough[row] = _NONE if alike else _PAGES + variance * (_HALF * LOG2E)
            plain[row] = _PAGES if alike else _NONE
            fine[row] = _EACH if alike else _NONE
        for kind in range(kinds):
            # Means that count, keys that count, and means that only weigh.
            if many_alike == (0 if kind > 0 else 32):
                continue
            source = kind if kind + 1 < kinds else 0
            more = rough if kind == 0 else plain if source == 0 else fine
            many = 0
            for word in range(words):
                flags = prompt.left[tile, head, word]
                if past < word * 64 + 64:
                    flags &= (1 << max(past - word * 64, 0)) - 1
                if flags != 0:
                    at = ((head * (kinds - 1) + source) * words + word) * 64 * head_dim
                    score_keys(work, block, many, prompt.key, at, 2 * head_dim)
                    for key in range(64):
                        if flags >> key & 1 == 0:
                            work.score[many * 64 + key, :] = _NONE
                    work.value[many] = (turned + kind * words + word) * head_dim * 64
                    many += 1
                if many == AT_ONCE or (many > 0 and word + 1 == words):
                    counted = kind + 1 < kinds
                    add_values(work, block, many, values, prompt.scale * LOG2E, more, counted)
                    many = 0


def _kernel(version: int) -> Any:
    """The kernel; see `sources` for the version."""

    @entry
    def attend_tiles(
        prompt: Prompt, values: Any, tiled: Any, threads: int, output: Any, lse: Any, own: Any,
        _part: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Every `threads`-th list, from numbers `start` to `stop` on."""
        _ = version
        tiles, kv_heads = prompt.counts.shape
        heads, head_dim = prompt.query.shape[1:]
        blocks = heads // kv_heads * 2
        work = Work(
            np.empty((blocks, head_dim * 16), np.uint32),
            np.empty((blocks, 32), np.float32),
            np.empty((blocks, 32), np.float32),
            np.empty((blocks, 32), np.float32),
            np.empty((blocks, head_dim * 32), np.float32),
            np.empty((AT_ONCE * 64, 32), np.float32),
            np.empty((AT_ONCE * 32, 32), np.uint32),
            np.empty(AT_ONCE, np.int64),
            np.zeros(1, np.int64),
        )
        rows, narrow = np.empty((32, head_dim), np.float32), np.empty((32, head_dim), np.uint16)
        before = np.empty(64, np.uint8)
        configured(before)
        configure(tiled)
        for first in range(start, stop):
            for unit in range(first, tiles * kv_heads, threads):
                head, tile = unit // tiles, unit % tiles
                load_queries(prompt, tile, head, work, narrow)
                _read(prompt, values, tile, head, work)
                write_lse(prompt, tile, head, work, own)
                if prompt.left.shape[2] > 0:
                    _stand_in(prompt, values, tile, head, work)
                write_lse(prompt, tile, head, work, lse)
                write_output(prompt, tile, head, work, rows, output)
        configure(before)

    return attend_tiles


_attend_tiles = _kernel(sources())
