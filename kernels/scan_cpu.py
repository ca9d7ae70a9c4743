"""The scan of one-bit codes on a CPU: products of signs and rounded queries, by counting bits.

A query is rounded to 16 levels, as RaBitQ does, so that its product with a row of signs is a sum of
popcounts over its four bit planes; that adds 3% to the variance of an estimate.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.page import PAGE

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 16
PLANES = 4
WORD = 64
ALONE = 1 << 18
"""Products of a query and a key under which one thread is faster than several."""


def scan(turned: Tensor, codes: Tensor, spread: Tensor, centre: Tensor) -> Tensor:
    """Estimated scores of the coded keys of some blocks, each a sequence's KV head.

    Args:
        turned: [blocks, queries, head_dim], rotated queries.
        codes: int64 [blocks, pages, words, 64].
        spread: [blocks, pages, 64], the keys' scales.
        centre: [blocks, queries, pages], products with the pages' means.

    Returns:
        float32 [blocks, queries, pages * 64].
    """
    blocks, queries, _ = turned.shape
    planes, step, constant = _rounded(turned.float())
    out = torch.empty(blocks, queries, codes.shape[1] * PAGE)
    arrays: list[Any] = [
        x.numpy()
        for x in (codes, planes, step, constant, spread.float(), centre.float().contiguous(), out)
    ]
    threads = min(torch.get_num_threads(), blocks * codes.shape[1])
    if threads == 1 or out.numel() < ALONE:
        _scan(*arrays, 0, blocks * codes.shape[1])
        return out
    edges = np.linspace(0, blocks * codes.shape[1], threads + 1).astype(int).tolist()
    work = [
        _pool(threads).submit(_scan, *[*arrays, start, stop]) for start, stop in pairwise(edges)
    ]
    for one in work:
        one.result()
    return out


def _rounded(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries on a grid, q = step (level - 7.5).

    Returns:
        The levels' bit planes int64 [blocks, queries, 4, words], and float32 [blocks, queries]:
        the step, and what a product has to be corrected by for the grid's middle, over the step.
    """
    head_dim = query.shape[-1]
    middle = (LEVELS - 1) / 2
    step = query.abs().amax(-1).div(middle).clamp_min(torch.finfo(query.dtype).tiny)
    levels = (query / step[..., None] + middle).round().nan_to_num(0).clamp(0, LEVELS - 1).long()
    constant = middle * head_dim - levels.sum(-1).float()
    levels = F.pad(levels, (0, -head_dim % WORD)).unflatten(-1, (-1, WORD))  # type: ignore[no-untyped-call]
    place = torch.arange(WORD)
    planes = [((levels >> plane & 1) << place).sum(-1) for plane in range(PLANES)]
    return torch.stack(planes, dim=2), step, constant


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saccade-scan")


def _count_bits(_typing: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = builder.module.declare_intrinsic("llvm.ctpop", [ir.IntType(64)])
        return builder.call(count, arguments)

    return types.int64(types.int64), generate


_popcount: Any = intrinsic(_count_bits)
"""LLVM's population count, which numba does not offer."""


def _scan_pages(
    codes: Any,
    planes: Any,
    step: Any,
    constant: Any,
    spread: Any,
    centre: Any,
    out: Any,
    start: int,
    stop: int,
) -> None:
    """Pages `start` to `stop` of all blocks' pages, counted through."""
    pages, words = codes.shape[1], codes.shape[2]
    queries = planes.shape[1]
    ones = np.empty(64, np.int64)
    sums = np.empty(64, np.int64)
    for number in range(start, stop):
        block, page = number // pages, number % pages
        ones[:] = 0
        for word in range(words):
            for key in range(64):
                ones[key] += _popcount(codes[block, page, word, key])
        for query in range(queries):
            for key in range(64):
                sums[key] = -15 * ones[key]
            for word in range(words):
                one, two = planes[block, query, 0, word], planes[block, query, 1, word]
                four, eight = planes[block, query, 2, word], planes[block, query, 3, word]
                for key in range(64):
                    code = codes[block, page, word, key]
                    sums[key] += (
                        2 * _popcount(code & one)
                        + 4 * _popcount(code & two)
                        + 8 * _popcount(code & four)
                        + 16 * _popcount(code & eight)
                    )
            size, shift = step[block, query], constant[block, query]
            middle = centre[block, query, page]
            for key in range(64):
                dot = size * (np.float32(sums[key]) + shift)
                out[block, query, page * 64 + key] = dot * spread[block, page, key] + middle


_scan: Any = numba.njit(nogil=True, fastmath={"contract"}, boundscheck=False)(_scan_pages)
