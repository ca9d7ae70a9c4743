"""The codes of pages that a decode step completes, of all layers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels import codes
from kernels.codes import WORD, rotation, words
from kernels.gpu import float8
from kernels.page import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.cache import LayerCache

CHUNK = 32
"""Channels that are rotated at once."""
FARTHEST, MOST = tl.constexpr(codes.FARTHEST), tl.constexpr(codes.MOST)


class Coder:
    """Does `LayerCache.code` in one launch, which a CUDA graph can hold.

    Args:
        caches: one a layer, all of one size.
    """

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        self._first = _parts(caches[0])
        # How many numbers behind the first layer's tensors each layer's lie: int64 [layers, parts].
        self._apart = torch.tensor(
            [_apart(_parts(cache), self._first) for cache in caches], device=caches[0].kv.device
        )

    def __call__(self, slots: Tensor) -> None:
        """Code the pages whose last keys have been written.

        Args:
            slots: int64 [rows], physical page * 64 + offset of each row's key, at most one a page;
                -1 for a row that has none.
        """
        kv = self._first[0]
        kv_heads, pages, _, _, head_dim = kv.shape
        _code_pages[len(self._apart), kv_heads](
            slots, self._apart, rotation(head_dim, torch.float32, kv.device), *self._first,
            len(slots), pages,
            ROWS=triton.next_power_of_2(len(slots)), PARTS=len(self._first), DIM=head_dim,
            CHUNK=CHUNK, WORDS=words(head_dim), WORD=WORD, PAGE=PAGE, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def _parts(cache: LayerCache) -> tuple[Tensor, ...]:
    """`LayerCache.parts`, of numbers that a kernel knows."""
    return tuple(part.view(torch.uint8) if part.itemsize == 1 else part for part in cache.parts)


def _apart(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[int]:
    """How many numbers tensors lie behind others."""
    pairs = zip(ones, others, strict=True)
    return [(one.data_ptr() - other.data_ptr()) // one.itemsize for one, other in pairs]


@triton.jit(do_not_specialize=["rows", "cache_pages"])
def _code_pages(
    slots, apart, rotated, kv, means, centres, codes, scales, value_means, spreads,
    rows, cache_pages,
    ROWS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    WORDS: tl.constexpr, WORD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head of one layer. Most steps complete no page."""
    layer, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    written = tl.load(slots + row, row < rows, -1)
    if tl.max(tl.where(written >= 0, written % PAGE, 0), 0) == PAGE - 1:
        apart += layer * PARTS
        kv += tl.load(apart)
        means += tl.load(apart + 1)
        centres += tl.load(apart + 2)
        codes += tl.load(apart + 3)
        scales += tl.load(apart + 4)
        value_means += tl.load(apart + 5)
        spreads += tl.load(apart + 6)
        for number in range(rows):
            slot = tl.load(slots + number)
            if (slot >= 0) & (slot % PAGE == PAGE - 1):
                page = kv_head * cache_pages + slot // PAGE
                _code(
                    rotated, kv + page * (PAGE * 2 * DIM), means + page * DIM,
                    centres + page * DIM, codes + page * (WORDS * PAGE), scales + page * PAGE,
                    value_means + page * DIM, spreads + page, DIM, CHUNK, WORDS, WORD, PAGE,
                )  # fmt: skip


@triton.jit
def _code(
    rotated, kv, means, centres, codes, scales, value_means, spread,
    DIM: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr, WORD: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Means, codes and scales of a page's keys: see `kernels.codes.encode`."""
    key, bit = tl.arange(0, PAGE), tl.arange(0, 2 * WORD)
    place = key // 32 * 32 + key % 8 * 4 + key % 32 // 8  # in the order of the codes
    squares = tl.zeros((PAGE,), tl.float32)
    lengths = tl.zeros((PAGE,), tl.float32)
    variance = 0.0
    for word in tl.static_range(WORDS // 2):  # two at once
        across = word * (2 * WORD) + bit
        turned = tl.zeros((PAGE, 2 * WORD), tl.float32)
        for start in range(0, DIM, CHUNK):
            channel = start + tl.arange(0, CHUNK)
            keys = _numbers(kv, key, channel, DIM)
            mean = (tl.sum(keys, 0) / PAGE).to(means.dtype.element_ty)
            byte = float8.to_byte(mean.to(tl.float32), FARTHEST)
            centre = float8.of_byte(byte)
            if word == 0:
                tl.store(means + channel, mean, channel < DIM)
                away = keys - mean.to(tl.float32)[None]
                variance += tl.sum(tl.sum(away * away, 0), 0)
                tl.store(centres + channel, byte, channel < DIM)
                values = _numbers(kv + DIM, key, channel, DIM)
                mean_value = (tl.sum(values, 0) / PAGE).to(means.dtype.element_ty)
                tl.store(value_means + channel, mean_value, channel < DIM)
            matrix = tl.load(
                rotated + channel[:, None] * DIM + across[None],
                (channel < DIM)[:, None] & (across < DIM)[None],
                0.0,
            )  # [CHUNK, 2 * WORD]
            turned = tl.dot(keys - centre[None], matrix, turned, input_precision="ieee")
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
def _numbers(kv, key, channel, DIM: tl.constexpr):
    """Some channels of a page's keys, or of its values: float32 [keys, channels]."""
    place = kv + key[:, None] * (2 * DIM) + channel[None]
    return tl.load(place, (channel < DIM)[None], 0.0).to(tl.float32)
