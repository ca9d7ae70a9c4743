"""Attention of a prompt's tiles over the pages they read, in a processor's tile registers.

Scores stand transposed, a key's in a row, so that what is done to each query is done in vectors:
32 queries of a head are a block. Dao 2023, "FlashAttention-2", page by page.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kernels.cpu.amx import configure, configured, multiply, shape, turn
from kernels.cpu.keys import numbers
from kernels.cpu.launch import entry, in_threads, jit, sources
from kernels.cpu.number import bits, long_vectors, number, small_power, stored
from kernels.page import PAGE
from kernels.tiles import ALIKE, SAMPLES, TURN
from kernels.torch_tiles import mean_spreads

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Segment
    from kernels.tiles import TileSelection

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_NONE = np.float32(-np.inf)
_ALIKE = np.float32(ALIKE)
_LOG2E, _LN2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
_PAGES, _EACH = np.float32(math.log2(PAGE)), np.float32(math.log2(PAGE / SAMPLES))

_AT_ONCE = 8
"""Pages whose scores are computed, and then their values added: outputs are loaded less often."""
_TOGETHER = 16
"""Pages that a block reads on end: as many as stay near while a tile's other blocks read them."""


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


class Work(NamedTuple):
    """What one block of queries has come to. In front the blocks of a tile and KV head."""

    query: Any  # uint32 [blocks, head_dim / 2 * 32]  pairs of channels
    variance: Any  # float32 [blocks, 32]
    most: Any  # float32 [blocks, 32]  greatest score
    total: Any  # float32 [blocks, 32]  of e ** (score - most)
    output: Any  # float32 [blocks, head_dim * 32]
    score: Any  # float32 [AT_ONCE * 64, 32]
    weight: Any  # uint32 [AT_ONCE * 32, 32]  pairs of keys, e ** (score - most)
    value: Any  # int64 [AT_ONCE]  where the values begin
    here: Any  # int64 [1], 0


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.prefill.tile_attention`; bfloat16, and whole blocks of channels."""
    prompt = _prompt(query.contiguous(), cache, segment, selection, scale)
    kv_heads, kinds = prompt.value.shape[:2]
    pages = len(prompt.table) + kinds * prompt.left.shape[2]
    values = np.empty((kv_heads * pages, cache.head_dim * PAGE), np.uint16)
    in_threads(_turn_values, (prompt, values), len(values))
    output, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    own = torch.empty_like(lse)
    threads = torch.get_num_threads()
    outputs = output.numpy(), lse.numpy(), own.numpy()
    in_threads(_attend_tiles, (prompt, values, shape(), threads, *outputs), threads)
    return output.to(query.dtype), lse, own


def _prompt(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> Prompt:
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


@jit
def _load(prompt: Prompt, tile: int, head: int, work: Work, rows: Any) -> None:
    """A tile's queries of a KV head, and nothing seen yet."""
    long_vectors()
    tokens, _heads, head_dim = prompt.query.shape
    blocks = work.query.shape[0]
    first = (prompt.start // 64 + tile) * 64 - prompt.start
    spread = prompt.spread[head, tile] * prompt.scale * prompt.scale
    for block in range(blocks):
        token = first + block % 2 * 32
        number_of = head * (blocks // 2) + block // 2
        for row in range(32):
            square = _ZERO
            if 0 <= token + row < tokens:
                for channel in range(head_dim):
                    value = prompt.query[token + row, number_of, channel]
                    rows[row, channel] = value
                    square += number(value) * number(value)
            else:
                rows[row, :] = 0
            work.variance[block, row] = square * spread
        for channel in range(0, head_dim, 32):
            for row in range(0, 32, 16):
                turn(
                    rows, row * head_dim + channel, 2 * head_dim,
                    work.query, block * head_dim * 16 + channel * 16 + row, 128,
                )  # fmt: skip
        work.most[block, :] = _NONE
        work.total[block, :] = _ZERO
        work.output[block, :] = _ZERO


@jit
def _score(work: Work, block: int, place: int, keys: Any, at: int, row: int) -> None:
    """Products of a block's queries and 64 keys, whose rows lie `row` bytes apart."""
    each = work.query.shape[1]
    for key in range(0, 64, 32):
        multiply(
            keys, at + key * (row // 2), work.here, 1, row, each // 512,
            work.query, block * each, work.score, (place * 64 + key) * 32, 0,
        )  # fmt: skip


@jit
def _hide(work: Work, place: int, words: Any, first: int) -> None:
    """Hide the keys that a block's queries do not see, by the bits of `words` [64]."""
    long_vectors()
    for key in range(64):
        for row in range(32):
            seen = words[first + row] >> key & 1
            score = work.score[place * 64 + key, row]
            work.score[place * 64 + key, row] = score if seen != 0 else _NONE


@jit
def _add(
    work: Work, block: int, many: int, values: Any, scale: Any, more: Any, counted: bool
) -> None:
    """Add values by the scores at hand, times `scale` and `more` [32] added to each.

    Args:
        work: see there.
        block: see there.
        many: times 64 values are added.
        values: uint16 [.., head_dim * 64], transposed.
        scale: factor on the scores.
        more: float32 [32].
        counted: whether their weights count in the total.
    """
    long_vectors()
    score, weight = work.score, work.weight
    peak = np.full(32, _NONE, np.float32)
    for key in range(0, many * 64, 4):
        for row in range(32):
            one, two = score[key, row], score[key + 1, row]
            three, four = score[key + 2, row], score[key + 3, row]
            one = one if one > two else two
            three = three if three > four else four
            one = one if one > three else three
            peak[row] = one if one > peak[row] else peak[row]
    moved = 0
    shift, less = np.empty(32, np.float32), np.empty(32, np.float32)
    most, total = work.most[block], work.total[block]
    for row in range(32):
        high = peak[row] * scale + more[row]
        before = most[row]
        high = high if high > before else before
        base = high if high > _NONE else _ZERO
        moved |= high > before
        most[row] = high
        shift[row] = more[row] - base
        less[row] = small_power(before - base)
    if moved:
        output = work.output[block]
        for channel in range(output.shape[0] // 32):
            for row in range(32):
                output[channel * 32 + row] *= less[row]
        for row in range(32):
            total[row] *= less[row]
    added = np.zeros(32, np.float32)
    for pair in range(many * 32):
        for row in range(32):
            one = small_power(score[2 * pair, row] * scale + shift[row])
            two = small_power(score[2 * pair + 1, row] * scale + shift[row])
            added[row] += one + two
            low, high = bits(one) + np.int32(0x8000), bits(two) + np.int32(0x8000)
            weight[pair, row] = np.uint32(low) >> np.uint32(16) | np.uint32(high) & np.uint32(
                0xFFFF0000
            )
    if counted:
        for row in range(32):
            total[row] += added[row]
    channels = values.shape[1] // 64
    for channel in range(0, channels, 32):
        multiply(
            values, channel * 64, work.value, many, 128, 2,
            weight, 0, work.output, (block * channels + channel) * 32, 1,
        )  # fmt: skip


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
            for begin in range(first, stop, _AT_ONCE):
                many = min(_AT_ONCE, stop - begin)
                for nth in range(many):
                    place = start + begin + nth
                    page = prompt.listed[place]
                    at = (head * prompt.pages + prompt.table[page]) * 64 * 2 * head_dim
                    _score(work, block, nth, prompt.kv, at, 4 * head_dim)
                    if begin + nth >= whole:
                        _hide(work, nth, prompt.bits[prompt.masks[place]], block % 2 * 32)
                    work.value[nth] = (turned + page) * head_dim * 64
                _add(work, block, many, values, prompt.scale * _LOG2E, nothing, True)


@jit
def _stand_in(prompt: Prompt, values: Any, tile: int, head: int, work: Work) -> None:
    """What stands for the pages that are left; see `kernels.reference._left`."""
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
            rough[row] = _NONE if alike else _PAGES + variance * (_HALF * _LOG2E)
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
                    _score(work, block, many, prompt.key, at, 2 * head_dim)
                    for key in range(64):
                        if flags >> key & 1 == 0:
                            work.score[many * 64 + key, :] = _NONE
                    work.value[many] = (turned + kind * words + word) * head_dim * 64
                    many += 1
                if many == _AT_ONCE or (many > 0 and word + 1 == words):
                    counted = kind + 1 < kinds
                    _add(work, block, many, values, prompt.scale * _LOG2E, more, counted)
                    many = 0


@jit
def _lse(prompt: Prompt, tile: int, head: int, work: Work, out: Any) -> None:
    """Write the log-sum-exps of what has been seen."""
    blocks = work.query.shape[0]
    first = (prompt.start // 64 + tile) * 64 - prompt.start
    for block in range(blocks):
        for row in range(32):
            token = first + block % 2 * 32 + row
            if 0 <= token < out.shape[0]:
                sum_ = np.log(work.total[block, row]) + work.most[block, row] * _LN2
                out[token, head * (blocks // 2) + block // 2] = sum_


@jit
def _store(prompt: Prompt, tile: int, head: int, work: Work, rows: Any, out: Any) -> None:
    """Write the outputs."""
    long_vectors()
    tokens, _heads, head_dim = prompt.query.shape
    blocks = work.query.shape[0]
    first = (prompt.start // 64 + tile) * 64 - prompt.start
    for block in range(blocks):
        for channel in range(0, head_dim, 16):
            for row in range(0, 32, 16):
                turn(
                    work.output, (block * head_dim + channel) * 32 + row, 128,
                    rows, row * head_dim + channel, 4 * head_dim,
                )  # fmt: skip
        for row in range(32):
            token = first + block % 2 * 32 + row
            if 0 <= token < tokens:
                total = work.total[block, row]
                part = _ONE / total if work.most[block, row] > _NONE else _ZERO
                for channel in range(head_dim):
                    out[token, head * (blocks // 2) + block // 2, channel] = (
                        rows[row, channel] * part
                    )


def _kernels(version: int) -> tuple[Any, Any, Any]:
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
            np.empty((_AT_ONCE * 64, 32), np.float32),
            np.empty((_AT_ONCE * 32, 32), np.uint32),
            np.empty(_AT_ONCE, np.int64),
            np.zeros(1, np.int64),
        )
        rows, narrow = np.empty((32, head_dim), np.float32), np.empty((32, head_dim), np.uint16)
        before = np.empty(64, np.uint8)
        configured(before)
        configure(tiled)
        for first in range(start, stop):
            for unit in range(first, tiles * kv_heads, threads):
                head, tile = unit // tiles, unit % tiles
                _load(prompt, tile, head, work, narrow)
                _read(prompt, values, tile, head, work)
                _lse(prompt, tile, head, work, own)
                if prompt.left.shape[2] > 0:
                    _stand_in(prompt, values, tile, head, work)
                _lse(prompt, tile, head, work, lse)
                _store(prompt, tile, head, work, rows, output)
        configure(before)

    return gather, turn_values, attend_tiles


_gather, _turn_values, _attend_tiles = _kernels(sources())
