"""From a step's projections to queries, and to keys and values in the cache: one launch a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kernels.gpu import overlap
from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache


def rotate_and_write(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: LayerCache,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate queries and keys, and write keys and values.

    Args:
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values.
        angles: cosines and sines of the rows' positions, float32 [rows, 1, head_dim / 2];
            channel i turns with channel i + head_dim / 2.
        slots: int64 [rows], physical page * 64 + offset of each row's key; -1 for a row that leaves
            the cache alone.
        cache: the layer's paged cache, in the dtype of `qkv`.
        norms: weights [head_dim] of the queries' and the keys' norms before the rotation, if any.
        eps: of these norms.

    Returns:
        The rotated queries [rows, heads, head_dim].
    """
    rows, kv_heads, head_dim = qkv.shape[0], cache.kv_heads, cache.head_dim
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(rows, heads, head_dim)
    query_norm, key_norm = norms or (qkv, qkv)  # not read where there are none
    overlaps = overlap.possible(qkv.device)
    _rotate_and_write[rows, heads + 2 * kv_heads](
        qkv, *angles, slots, query_norm, key_norm, query, cache.kv, eps, cache.kv.shape[1],
        HEADS=heads, KV_HEADS=kv_heads, DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        NORMED=norms is not None, PAGE=PAGE, OVERLAP=overlaps, launch_pdl=overlaps,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["cache_pages"])
def _rotate_and_write(
    qkv, cosines, sines, slots, query_norm, key_norm, query, kv, eps, cache_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    NORMED: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one row: of its queries, of its keys or of its values."""
    overlap.begin(OVERLAP)
    row, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.arange(0, WIDTH // 2)
    inside = first < DIM // 2
    second = first + DIM // 2
    cosine = tl.load(cosines + row * (DIM // 2) + first, inside, 0.0)
    sine = tl.load(sines + row * (DIM // 2) + first, inside, 0.0)
    if NORMED:
        norm = tl.where(job < HEADS, query_norm, key_norm)
        first_factor = tl.load(norm + first, inside, 0.0).to(tl.float32)
        second_factor = tl.load(norm + second, inside, 0.0).to(tl.float32)
    overlap.wait(OVERLAP)
    head = qkv + (row * (HEADS + 2 * KV_HEADS) + job) * DIM
    one, other = tl.load(head + first, inside, 0.0), tl.load(head + second, inside, 0.0)
    if job < HEADS + KV_HEADS:
        dtype = head.dtype.element_ty
        x, y = one.to(tl.float32), other.to(tl.float32)
        if NORMED:  # rounded as `models.decoder.RMSNorm` does
            size = tl.rsqrt(tl.sum(x * x + y * y, 0) / DIM + eps)
            x = (first_factor * (x * size).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            y = (second_factor * (y * size).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        one, other = (x * cosine - y * sine).to(dtype), (y * cosine + x * sine).to(dtype)
    target = query + (row * HEADS + job) * DIM
    if job >= HEADS:
        number = job - HEADS  # of the key, or behind all keys of the value
        place = (number % KV_HEADS).to(tl.int64) * (cache_pages * PAGE) + slot
        target = kv + place * (2 * DIM) + number // KV_HEADS * DIM
        inside = tl.where(slot >= 0, inside, False)  # a row of padding writes nothing
    tl.store(target + first, one, inside)
    tl.store(target + second, other, inside)
