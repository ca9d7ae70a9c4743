"""Exact scores: of keys at given positions, or of a run of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.codes import NOISE
from kernels.gpu.launch import splits_for, tile_of
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows

BLOCK = 64
"""Keys that a program reads at once."""


def score_run(
    query: Tensor, cache: LayerCache, rows: Rows, starts: Tensor, stops: Tensor, scale: float,
    first: int | Tensor, keys: int,
) -> Tensor:  # fmt: skip
    """Scores of `keys` consecutive keys a row.

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        starts: int64 [rows], first key that a row sees; those before it have -inf.
        stops: int64 [rows], end of the keys that it sees; those behind have -inf.
        scale: factor on the scores.
        first: position of the first key; of all rows, or int64 [rows].
        keys: how many, from 1.

    Returns:
        float32 [rows, kv_heads, group, keys].
    """
    if isinstance(first, int):
        first = torch.full_like(starts, first)
    scores, _ = _launch(query, cache, rows, (starts, stops), scale, first, keys, None)
    return scores


def score_chosen(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float, chosen: Tensor, least: Tensor,
    estimates: Tensor, lse: Tensor, norm: Tensor, first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores of the candidates, and the mass of the keys that are none (`kernels.candidates`).

    Args:
        query: [rows, heads, head_dim], of the cache's dtype.
        cache: the layer's paged cache.
        rows: where each row's keys lie.
        scale: factor on the scores.
        chosen: int64 [rows, kv_heads, candidates], positions, -1 behind the last.
        least: float32 [rows, kv_heads], share of the least candidate; -1 where all keys are.
        estimates: float32 [rows, kv_heads, group, keys], scores by the codes.
        lse: float32 [rows, kv_heads, group], their log-sum-exp.
        norm: float32 [rows, kv_heads, group], log of a head's whole mass.
        first: position of the first of the estimates' keys.

    Returns:
        float32 [rows, kv_heads, group, candidates], -inf where there is none; and [rows, kv_heads,
        group], the log of the estimated mass of the other coded keys.
    """
    scores, gone = _launch(
        query, cache, rows, (least, estimates), scale, torch.full_like(rows.starts, first),
        chosen.shape[-1], (chosen, lse, norm),
    )  # fmt: skip
    return scores, lse + (1 - gone.sum(-1)).clamp_min(0).log()


def _launch(
    query: Tensor, cache: LayerCache, rows: Rows, two: tuple[Tensor, Tensor], scale: float,
    first: Tensor, keys: int, listed: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count, heads, head_dim = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    blocks = -(-keys // BLOCK)
    splits = splits_for(count * kv_heads, blocks)
    out = torch.empty(count, kv_heads, group, keys, device=query.device)
    gone = torch.empty(count, kv_heads, group, splits, device=query.device)
    chosen, lse, norm = listed if listed is not None else (first, out, out)
    overlap = out
    if listed is not None:
        # Covariances of the estimates' errors, but for the keys' part.
        wide = query.float().view(count, kv_heads, group, head_dim) * scale
        overlap = (wide @ wide.mT * NOISE).contiguous()  # [rows, kv_heads, group, group]
    _score[count, kv_heads, splits](
        query, cache.kv, cache.scale, rows.block_tables, first, *two, chosen, lse, norm, overlap,
        out, gone, scale, rows.queries, keys, two[1].shape[-1], rows.block_tables.stride(0),
        cache.kv.shape[1], -(-blocks // splits),
        GROUP=group, TILE=tile_of(group), DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        LISTED=listed is not None, BLOCK=BLOCK, PAGE=PAGE, num_warps=4,
    )  # fmt: skip
    return out, gone


@triton.jit(do_not_specialize=["queries", "keys", "width", "table_stride", "cache_pages", "blocks"])
def _score(
    query, kv, scales, tables, firsts, one, two, chosen, lse, norm, overlap,
    out, gone, scale, queries, keys, width, table_stride,
    cache_pages, blocks,
    GROUP: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One row and KV head against a split of its keys.

    LISTED: keys are those of `chosen`, `one` is the least share and `two` are the estimates; `gone`
    is the share of a head's estimated mass that is of candidates for sure. Else keys are a run from
    `firsts` on, and `one` and `two` are its seen part.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    line = row * kv_heads + kv_head
    head, channel = tl.arange(0, TILE), tl.arange(0, WIDTH)
    wide = (head < GROUP)[:, None] & (channel < DIM)[None]
    own = tl.load(query + (line * GROUP + head[:, None]) * DIM + channel[None], wide, 0.0)
    table = tables + (row // queries) * table_stride
    first = tl.load(firsts + row)
    base = kv_head.to(tl.int64) * cache_pages * PAGE
    low = split * blocks * BLOCK
    lost = tl.zeros((TILE,), tl.float32)
    for block in range(low, min(low + blocks * BLOCK, keys), BLOCK):
        key = block + tl.arange(0, BLOCK)
        if LISTED:
            position = tl.load(chosen + line * keys + key, key < keys, -1)
            seen = position >= 0
        else:
            position = first + key
            seen = (position >= tl.load(one + row)) & (position < tl.load(two + row)) & (key < keys)
        page = tl.load(table + position // PAGE, seen, 0)
        slot = base + page * PAGE + position % PAGE
        data = tl.load(
            kv + slot[:, None] * (2 * DIM) + channel[None],
            seen[:, None] & (channel < DIM)[None],
            0.0,
        )  # [BLOCK, WIDTH]
        score = tl.dot(own, tl.trans(data), input_precision="ieee") * scale  # [TILE, BLOCK]
        score = tl.where(seen[None], score, float("-inf"))
        tl.store(
            out + (line * GROUP + head[:, None]) * keys + key[None],
            score,
            (head < GROUP)[:, None] & (key < keys)[None],
        )
        if LISTED:
            size = tl.load(scales + slot, seen, 0.0)
            size = size * size
            least = tl.load(one + line)
            for reader in tl.static_range(GROUP):
                share = tl.zeros((BLOCK,), tl.float32)  # of the group's mass, after the tilt
                mine = tl.zeros((BLOCK,), tl.float32)  # of the reader's coded mass
                for other in tl.static_range(GROUP):
                    place = line * GROUP + other
                    guess = tl.load(two + place * width + position - first, seen, float("-inf"))
                    tilt = tl.load(overlap + place * GROUP + reader) * size
                    share += tl.exp(guess - tl.load(norm + place) - tilt)
                    if other == reader:
                        mine = tl.exp(guess - tl.load(lse + place))
                sure = tl.sum(tl.where(share / GROUP < least, 0.0, mine), 0)
                lost += tl.where(head == reader, sure, 0.0)
    if LISTED:
        splits = tl.num_programs(2)
        tl.store(gone + (line * GROUP + head) * splits + split, lost, head < GROUP)
