"""A step's dense attention from its projections: rotated, written and attended to in one launch.

`kernels.gpu.rotate` and `kernels.gpu.attend` in one, so that a layer has no launch between its
projections and its attention. The programs of a row rotate its queries each for themselves. None
waits for what another writes: the row's own key, which one of them puts into the cache, all take
from the projections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.codes import WORD, rotation, words
from kernels.gpu import overlap
from kernels.gpu.attend import attend_run, dense_block, dense_splits
from kernels.gpu.launch import tile_of
from kernels.gpu.parts import Parts, join_here, leave
from kernels.gpu.rotate import CHUNK, CODED, code_keys, head_size, turn_head
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


JOINED = 16
"""Parts that a program joins, at the most: all are on their way to it at once."""


def rotate_and_attend(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: LayerCache,
    rows: Rows,
    tickets: Tensor,
    scale: float,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`rotate_and_write`, and `dense_decode` of the queries.

    Args:
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values.
        angles: cosines and sines, see `rotate_and_write`.
        slots: int64 [rows], where each row's last key goes; -1 for a row that leaves the cache
            alone. At most one a page.
        cache: the layer's paged cache, in the dtype of `qkv`, whose keys' places do not count.
        rows: where each row's keys lie, its own included; one row a sequence. Nothing has written
            these or the slots since an ordinary launch, one that waited for all before it: they are
            read, and keys brought into the L2 cache, while the projections are still computed.
        tickets: int32 [rows * kv_heads], zeros: up to `JOINED` parts are joined by the last program
            that leaves one, which makes them zeros again. Nothing else may use them meanwhile.
        scale: factor on the scores.
        norms: weights [head_dim] of the queries' and the keys' norms before the rotation, if any.
        eps: of these norms.

    Returns:
        Output [rows, heads, head_dim] and log-sum-exp, float32 [rows, heads].
    """
    assert rows.queries == 1 and cache.slopes is None
    count, kv_heads, head_dim = qkv.shape[0], cache.kv_heads, cache.head_dim
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    width = triton.next_power_of_2(head_dim)
    block = dense_block(width * qkv.itemsize)
    blocks = -(-rows.block_tables.shape[1] * PAGE // block)
    splits = dense_splits(blocks, count * kv_heads)
    query = qkv[:, : heads * head_dim].view(count, heads, head_dim)
    parts = Parts.of(query, splits, weighted=False)
    joining = 1 < splits <= JOINED
    output = qkv.new_empty(query.shape) if joining else parts.outputs
    lse = parts.lses.new_empty(count, heads) if joining else parts.lses
    query_norm, key_norm = norms or (qkv, qkv)  # not read where there are none
    overlaps = overlap.possible(qkv.device)
    _rotate_and_attend[count, kv_heads, splits + PAGE // CODED](
        qkv, *angles, slots, query_norm, key_norm, rotation(head_dim, torch.float32, qkv.device),
        cache.kv, cache.key_mean, cache.codes, cache.scale, cache.value_mean, cache.spread,
        rows.block_tables, rows.starts, rows.lengths, parts.outputs, parts.lses, output, lse,
        tickets, eps, scale,
        rows.block_tables.stride(0), cache.kv.shape[1], -(-blocks // splits), splits,
        GROUP=heads // kv_heads, TILE=tile_of(heads // kv_heads), DIM=head_dim, WIDTH=width,
        BLOCK=block, SPLITS=triton.next_power_of_2(splits) if joining else 0,
        NORMED=norms is not None, CODED=CODED, CHUNK=CHUNK, WORDS=words(head_dim), WORD=WORD,
        PAGE=PAGE, OVERLAP=overlaps, launch_pdl=overlaps, num_warps=4, num_stages=2,
        enable_fp_fusion=False,
    )  # fmt: skip
    return (output, lse) if joining else parts.joined()[:2]


@triton.jit(do_not_specialize=["table_stride", "cache_pages", "blocks", "splits"])
def _rotate_and_attend(
    qkv, cosines, sines, slots, query_norm, key_norm, rotated, kv, means, codes, scales,
    value_means, spreads, tables, starts, lengths, outputs, lses, output, lse, tickets, eps, scale,
    table_stride, cache_pages, blocks, splits,
    GROUP: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, NORMED: tl.constexpr, CODED: tl.constexpr,
    CHUNK: tl.constexpr, WORDS: tl.constexpr, WORD: tl.constexpr, PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row and KV head over a split of its keys, or a part of a page that the row completes."""
    overlap.begin(OVERLAP)
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    slot = tl.load(slots + row).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    line = qkv + row * (kv_heads * (GROUP + 2) * DIM)
    cosines += row * (DIM // 2)
    sines += row * (DIM // 2)
    own_key = line + (kv_heads * GROUP + kv_head) * DIM
    own_value = own_key + kv_heads * DIM
    if part < splits:
        table, base = tables + row * table_stride, kv_head.to(tl.int64) * cache_pages
        start, length = tl.load(starts + row).to(tl.int32), tl.load(lengths + row).to(tl.int32)
        own, first = length - 1, part * blocks * BLOCK  # a row of padding has no own key
        low, high = tl.maximum(first, start // BLOCK * BLOCK), first + blocks * BLOCK
        mine = (own >= first) & (own < high)
        high = tl.minimum(high, own)
        _fetch(kv, table, base, low + tl.arange(0, BLOCK), high, DIM, PAGE, OVERLAP)
        overlap.wait(OVERLAP)
        size = head_size(own_key, channel, eps, 0, DIM, NORMED)
        key = turn_head(own_key, key_norm, size, cosines, sines, channel, DIM, NORMED)
        value = tl.load(own_value + channel, channel < DIM, 0.0)
        place = kv + (base * PAGE + slot) * (2 * DIM) + channel
        written = channel < tl.where(mine & (slot >= 0), DIM, 0)
        tl.store(place, key, written)
        tl.store(place + DIM, value, written)
        number = tl.arange(0, TILE)
        there = number < GROUP
        head = line + (kv_head * GROUP + number % GROUP)[:, None] * DIM
        size = head_size(head, channel[None], eps, 1, DIM, NORMED)
        if NORMED:
            size = size[:, None]
        query = turn_head(head, query_norm, size, cosines, sines, channel[None], DIM, NORMED)
        begin = tl.full((TILE,), start, tl.int32)
        stop = tl.full((TILE,), high, tl.int32)
        peak, total, sums = attend_run(
            query, kv, table, base, low, high, start, begin, stop, lengths, number, scale,
            GROUP, TILE, DIM, WIDTH, BLOCK, False, PAGE,
        )  # fmt: skip
        peak, total, sums = _add_own(query, key, value, mine, scale, peak, total, sums)
        target = row * (kv_heads * GROUP) + kv_head * GROUP + number % GROUP
        wide = there[:, None] & (channel < DIM)[None]
        leave(outputs, lses, target * splits + part, channel, wide, there, peak, total, sums, DIM)
        if SPLITS > 0:
            ticket = tickets + row * kv_heads + kv_head
            tl.debug_barrier()  # all of this part is written
            if tl.atomic_add(ticket, 1, sem="acq_rel") == splits - 1:
                tl.store(ticket, 0)
                join_here(
                    outputs, lses, output, lse, target, there, channel, wide, splits, DIM, WIDTH,
                    TILE, SPLITS,
                )  # fmt: skip
    elif (slot >= 0) & (slot % PAGE == PAGE - 1):
        overlap.wait(OVERLAP)
        size = head_size(own_key, channel, eps, 0, DIM, NORMED)
        page = kv_head.to(tl.int64) * cache_pages + slot // PAGE
        code_keys(
            own_key, key_norm, size, cosines, sines, rotated, kv + page * (PAGE * 2 * DIM),
            means + page * DIM, codes + page * (WORDS * PAGE), scales + page * PAGE,
            own_value, value_means + page * DIM, spreads + page, (part - splits) * CODED,
            DIM, NORMED, CODED, CHUNK, WORDS, WORD, PAGE,
        )  # fmt: skip


@triton.jit
def _add_own(query, key, value, mine, scale, peak, total, sums):
    """One more key [WIDTH] and value into a running softmax; see `kernels.gpu.parts.add_scores`."""
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None], 1) * scale
    score = tl.where(mine, score, float("-inf"))  # [TILE]
    higher = tl.maximum(peak, score)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink, mass = tl.exp(peak - safe), tl.exp(score - safe)
    rounded = mass.to(value.dtype).to(tl.float32)
    sums = sums * shrink[:, None] + rounded[:, None] * value.to(tl.float32)[None]
    return higher, total * shrink + mass, sums


@triton.jit
def _fetch(
    kv, table, base, position, high, DIM: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Have some keys and values, which steps before wrote, in the L2 cache when they are needed."""
    numbers: tl.constexpr = 128 // (kv.dtype.element_ty.primitive_bitwidth // 8)
    position = tl.where(position < high, position, 0)
    page = tl.load(table + position // PAGE, position < high, 0)
    place = ((base + page) * PAGE + position % PAGE) * (2 * DIM)
    piece = tl.arange(0, triton.next_power_of_2(triton.cdiv(2 * DIM, numbers))) * numbers
    overlap.prefetch(kv + place[:, None] + tl.minimum(piece, 2 * DIM - 1)[None], OVERLAP)
