"""From a step's projections to queries, and to keys and values in the cache: one launch a layer.

A key that completes its page has the page coded in the same launch, by programs that compute the
key for themselves: nothing waits for what another program writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import codes
from kernels.codes import WORD, rotation, words
from kernels.gpu import float8, overlap
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache

CODED = 16
"""Keys that a program codes: a quarter of a page."""
CHUNK = 32
"""Channels that it rotates at once."""
FARTHEST, MOST = tl.constexpr(codes.FARTHEST), tl.constexpr(codes.MOST)


def rotate_and_write(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: LayerCache,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    *,
    coded: bool = True,
) -> Tensor:
    """Rotate queries and keys, write keys and values, and code the pages that this completes.

    Args:
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values.
        angles: cosines and sines of the rows' positions, float32 [rows, 1, head_dim / 2];
            channel i turns with channel i + head_dim / 2.
        slots: int64 [rows], physical page * 64 + offset of each row's key; -1 for a row that leaves
            the cache alone. Where pages are coded, at most one a page.
        cache: the layer's paged cache, in the dtype of `qkv`.
        norms: weights [head_dim] of the queries' and the keys' norms before the rotation, if any.
        eps: of these norms.
        coded: whether pages are coded; else `LayerCache.code` has yet to be called.

    Returns:
        The rotated queries [rows, heads, head_dim].
    """
    rows, kv_heads, head_dim = qkv.shape[0], cache.kv_heads, cache.head_dim
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(rows, heads, head_dim)
    query_norm, key_norm = norms or (qkv, qkv)  # not read where there are none
    overlaps = overlap.possible(qkv.device)
    jobs = heads + 2 * kv_heads
    programs = kv_heads * (PAGE // CODED) if coded else jobs
    each = triton.next_power_of_2(triton.cdiv(jobs, programs))
    _rotate_and_write[rows, programs](
        qkv, *angles, slots, query_norm, key_norm, rotation(head_dim, torch.float32, qkv.device),
        query, cache.kv, cache.key_mean, cache.centre.view(torch.uint8), cache.codes,
        cache.scale.view(torch.uint8), cache.value_mean, cache.spread,
        eps, cache.kv.shape[1],
        HEADS=heads, KV_HEADS=kv_heads, EACH=each, DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        NORMED=norms is not None, CODES=coded, CODED=CODED, CHUNK=CHUNK, WORDS=words(head_dim),
        WORD=WORD, PAGE=PAGE, OVERLAP=overlaps, launch_pdl=overlaps,
        num_warps=4 if coded else 1, enable_fp_fusion=False,
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["cache_pages"])
def _rotate_and_write(
    qkv, cosines, sines, slots, query_norm, key_norm, rotated, query, kv, means, centres, codes,
    scales, value_means, spreads, eps, cache_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, EACH: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, NORMED: tl.constexpr, CODES: tl.constexpr, CODED: tl.constexpr,
    CHUNK: tl.constexpr, WORDS: tl.constexpr, WORD: tl.constexpr, PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some of one row's queries, keys and values, and a part of a page that the row completes."""
    overlap.begin(OVERLAP)
    overlap.wait(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    line = qkv + row * ((HEADS + 2 * KV_HEADS) * DIM)
    cosines += row * (DIM // 2)
    sines += row * (DIM // 2)
    channel, every = tl.arange(0, WIDTH)[None], HEADS + 2 * KV_HEADS
    job = part * EACH + tl.arange(0, EACH)[:, None]  # first queries, then keys, then values
    head = line + tl.minimum(job, every - 1) * DIM
    size = _size(head, channel, eps, DIM, NORMED)
    norm = tl.where(job < HEADS, query_norm, key_norm)
    turned = _turned(head, norm, size, cosines, sines, channel, DIM, NORMED)
    inside = channel < DIM
    value = tl.load(head + channel, inside, 0.0)
    result = tl.where(job < HEADS + KV_HEADS, turned, value)
    tl.store(query + (row * HEADS + job) * DIM + channel, result, inside & (job < HEADS))
    # A row of padding writes nothing.
    place = ((job - HEADS) % KV_HEADS).to(tl.int64) * cache_pages * PAGE + slot
    target = kv + place * (2 * DIM) + (job - HEADS) // KV_HEADS * DIM + channel
    written = (job >= HEADS) & (job < every) & tl.where(slot >= 0, inside, False)
    tl.store(target, result, written)
    if CODES and (slot >= 0) & (slot % PAGE == PAGE - 1):
        kv_head = part // (PAGE // CODED)
        key = line + (HEADS + kv_head) * DIM
        own = _size(key, tl.arange(0, WIDTH), eps, DIM, NORMED)
        page = kv_head.to(tl.int64) * cache_pages + slot // PAGE
        _code(
            key, key_norm, own, cosines, sines, rotated, kv + page * (PAGE * 2 * DIM),
            means + page * DIM, centres + page * DIM, codes + page * (WORDS * PAGE),
            scales + page * PAGE,
            line + (HEADS + KV_HEADS + kv_head) * DIM, value_means + page * DIM, spreads + page,
            part % (PAGE // CODED) * CODED,
            DIM, NORMED, CODED, CHUNK, WORDS, WORD, PAGE,
        )  # fmt: skip


@triton.jit
def _size(head, channel, eps, DIM: tl.constexpr, NORMED: tl.constexpr):
    """What normalises heads: their root mean squares, inverted; 1 where there is no norm."""
    size = 1.0
    if NORMED:
        wide = tl.load(head + channel, channel < DIM, 0.0).to(tl.float32)
        total = tl.sum(wide * wide, len(wide.shape) - 1, keep_dims=True)
        size = tl.rsqrt(total / DIM + eps)
    return size


@triton.jit
def _turned(
    head, norm, size, cosines, sines, channel, DIM: tl.constexpr, NORMED: tl.constexpr
):  # fmt: skip
    """Some channels of a head, normalised and rotated, in the dtype of the head."""
    first = channel < DIM // 2
    other = tl.where(first, channel + DIM // 2, channel - DIM // 2)
    angle = tl.where(first, channel, other)
    inside = channel < DIM
    cosine = tl.load(cosines + angle, inside, 0.0)
    sine = tl.load(sines + angle, inside, 0.0)
    mine = _normed(head, norm, size, channel, inside, NORMED)
    partner = _normed(head, norm, size, other, inside, NORMED)
    turned = mine * cosine + partner * tl.where(first, -sine, sine)
    return turned.to(head.dtype.element_ty)


@triton.jit
def _normed(head, norm, size, channel, inside, NORMED: tl.constexpr):
    """Some channels in float32, normalised as `models.decoder.RMSNorm` does and rounds."""
    x = tl.load(head + channel, inside, 0.0).to(tl.float32)
    if NORMED:
        dtype = head.dtype.element_ty
        factor = tl.load(norm + channel, inside, 0.0).to(tl.float32)
        x = (factor * (x * size).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return x


@triton.jit
def _code(
    head, norm, size, cosines, sines, rotated, kv, means, centres, codes, scales,
    value, value_means, spread, low,
    DIM: tl.constexpr, NORMED: tl.constexpr, CODED: tl.constexpr, CHUNK: tl.constexpr,
    WORDS: tl.constexpr, WORD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Codes of a page's keys `low` to `low + CODED`; see `kernels.codes.encode`.

    The page's last key comes from `head` and its last value from `value`: the cache may not have
    them yet. What is of the whole page all of its programs write, each the same.
    """
    every, mine, bit = tl.arange(0, PAGE), low + tl.arange(0, CODED), tl.arange(0, 2 * WORD)
    place = mine // 32 * 32 + mine % 8 * 4 + mine % 32 // 8  # in the order of the codes
    squares = tl.zeros((CODED,), tl.float32)
    lengths = tl.zeros((CODED,), tl.float32)
    variance = 0.0
    for word in tl.static_range(WORDS // 2):  # two at once
        across = word * (2 * WORD) + bit
        turned = tl.zeros((CODED, 2 * WORD), tl.float32)
        for start in range(0, DIM, CHUNK):
            channel = start + tl.arange(0, CHUNK)
            last = _turned(head, norm, size, cosines, sines, channel, DIM, NORMED)
            keys = _keys(kv, every, channel, last, DIM, PAGE)
            mean = (tl.sum(keys, 0) / PAGE).to(head.dtype.element_ty)
            byte = float8.to_byte(mean.to(tl.float32), FARTHEST)
            centre = float8.of_byte(byte)
            if word == 0:
                tl.store(means + channel, mean, channel < DIM)
                away = keys - mean.to(tl.float32)[None]
                variance += tl.sum(tl.sum(away * away, 0), 0)
                tl.store(centres + channel, byte, channel < DIM)
                newest = tl.load(value + channel, channel < DIM, 0.0)
                values = _keys(kv + DIM, every, channel, newest, DIM, PAGE)
                mean_value = (tl.sum(values, 0) / PAGE).to(head.dtype.element_ty)
                tl.store(value_means + channel, mean_value, channel < DIM)
            rest = _keys(kv, mine, channel, last, DIM, PAGE) - centre[None]
            matrix = tl.load(
                rotated + channel[:, None] * DIM + across[None],
                (channel < DIM)[:, None] & (across < DIM)[None],
                0.0,
            )  # [CHUNK, 2 * WORD]
            turned = tl.dot(rest, matrix, turned, input_precision="ieee")
        signs = ((turned >= 0) & (across < DIM)[None]).to(tl.int64)
        signs = tl.sum(signs << bit[None].to(tl.int64), 1)
        target = codes + (place // 4 * WORDS + 2 * word) * 4 + place % 4
        tl.store(target, signs.to(tl.int32))
        tl.store(target + 4, (signs >> 32).to(tl.int32))
        squares += tl.sum(turned * turned, 1)
        lengths += tl.sum(tl.abs(turned), 1)
    tl.store(spread, variance / (PAGE * DIM))
    scale = squares / tl.maximum(lengths, 1e-30)
    scale = tl.where(scale <= MOST, scale, float("nan"))  # `kernels.codes.stored_scale`
    tl.store(scales + place, float8.to_byte(scale, MOST))


@triton.jit
def _keys(kv, key, channel, last, DIM: tl.constexpr, PAGE: tl.constexpr):
    """Some channels of a page's keys, or values, the last given: float32 [keys, channels]."""
    stored = tl.load(
        kv + key[:, None] * (2 * DIM) + channel[None],
        (key < PAGE - 1)[:, None] & (channel < DIM)[None],
        0.0,
    )
    whole = tl.where((key == PAGE - 1)[:, None] & (channel < DIM)[None], last[None], stored)
    return whole.to(tl.float32)
