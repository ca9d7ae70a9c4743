"""Long rows on a CPU: the scan of one-bit codes, by counting bits, and the choice of the greatest.

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


def scan(
    turned: Tensor, codes: Tensor, scales: Tensor, tables: Tensor, centre: Tensor, penalty: Tensor
) -> Tensor:
    """Estimated scores of coded keys, in place: no code is copied.

    Args:
        turned: [kv_heads, sequences, queries, head_dim], rotated queries.
        codes: int64 [kv_heads, cached pages, words, 64].
        scales: float32 [kv_heads, cached pages, 64].
        tables: int64 [sequences, pages], physical pages.
        centre: [kv_heads, sequences, queries, pages], products with the pages' means.
        penalty: [kv_heads, sequences, queries], taken off each score, times the square of the
            key's scale.

    Returns:
        float32 [kv_heads, sequences, queries, pages * 64].
    """
    planes, step, constant = _rounded(turned.float())
    out = torch.empty(*turned.shape[:3], tables.shape[1] * PAGE)
    arrays: list[Any] = [
        x.contiguous().numpy()
        for x in (codes, scales, tables, planes, step, constant, centre.float(), penalty.float())
    ]
    _in_threads(_scan, [*arrays, out.numpy()], turned.shape[0] * tables.numel(), out.numel())
    return out


def _in_threads(work: Any, arrays: list[Any], units: int, size: int) -> None:
    """Run `work` on all of its units, in as many threads as torch has."""
    threads = min(torch.get_num_threads(), units)
    if threads <= 1 or size < ALONE:
        work(*arrays, 0, units)
        return
    edges = np.linspace(0, units, threads + 1).astype(int).tolist()
    parts = [_pool(threads).submit(work, *[*arrays, *edge]) for edge in pairwise(edges)]
    for part in parts:
        part.result()


def best(scores: Tensor, count: int) -> Tensor:
    """See `kernels.budget.best`; float32 alone.

    The `count`-th greatest is found by its bits, which order as positive numbers do: eleven at a
    time, by counting.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    out = torch.full((rows.shape[0], count), -1, dtype=torch.int64)
    _in_threads(_best, [rows.view(torch.int32).numpy(), out.numpy()], rows.shape[0], rows.numel())
    return out.view(*scores.shape[:-1], count)


def _rounded(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries on a grid, q = step (level - 7.5).

    Returns:
        The levels' bit planes int64 [..., 4, words], and float32 [...]: the step, and what a
        product has to be corrected by for the grid's middle, over the step.
    """
    head_dim = query.shape[-1]
    middle = (LEVELS - 1) / 2
    step = query.abs().amax(-1).div(middle).clamp_min(torch.finfo(query.dtype).tiny)
    levels = (query / step[..., None] + middle).round().nan_to_num(0).clamp(0, LEVELS - 1).long()
    constant = middle * head_dim - levels.sum(-1).float()
    levels = F.pad(levels, (0, -head_dim % WORD)).unflatten(-1, (-1, WORD))  # type: ignore[no-untyped-call]
    place = torch.arange(WORD)
    planes = [((levels >> plane & 1) << place).sum(-1) for plane in range(PLANES)]
    return torch.stack(planes, dim=-2), step, constant


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
    scales: Any,
    tables: Any,
    planes: Any,
    step: Any,
    constant: Any,
    centre: Any,
    penalty: Any,
    out: Any,
    start: int,
    stop: int,
) -> None:
    """Pages `start` to `stop` of all pages of all sequences of all KV heads."""
    words = codes.shape[2]
    sequences, pages = tables.shape
    queries = planes.shape[2]
    ones = np.empty(64, np.int64)
    sums = np.empty(64, np.int64)
    for number in range(start, stop):
        head, rest = number // (sequences * pages), number % (sequences * pages)
        sequence, page = rest // pages, rest % pages
        cached = tables[sequence, page]
        code, scale = codes[head, cached], scales[head, cached]
        ones[:] = 0
        for word in range(words):
            for key in range(64):
                ones[key] += _popcount(code[word, key])
        for query in range(queries):
            for key in range(64):
                sums[key] = -15 * ones[key]
            for word in range(words):
                plane = planes[head, sequence, query, :, word]
                one, two, four, eight = plane[0], plane[1], plane[2], plane[3]
                for key in range(64):
                    bits = code[word, key]
                    sums[key] += (
                        2 * _popcount(bits & one)
                        + 4 * _popcount(bits & two)
                        + 8 * _popcount(bits & four)
                        + 16 * _popcount(bits & eight)
                    )
            size, shift = step[head, sequence, query], constant[head, sequence, query]
            middle = centre[head, sequence, query, page]
            less = penalty[head, sequence, query]
            scores = out[head, sequence, query, page * 64 : page * 64 + 64]
            for key in range(64):
                dot = size * (np.float32(sums[key]) + shift)
                scores[key] = (dot - less * scale[key]) * scale[key] + middle


_scan: Any = numba.njit(nogil=True, fastmath={"contract"}, boundscheck=False)(_scan_pages)


def _best_rows(bits: Any, out: Any, start: int, stop: int) -> None:
    """Rows `start` to `stop` of all rows."""
    count = out.shape[1]
    size = bits.shape[1]
    bins = np.empty(2048, np.int64)
    for row in range(start, stop):
        low, width, wanted = 0, 31, count  # the greatest `wanted` have bits low to low + 2^width
        short = False
        while width > 0 and not short:
            shift = max(0, width - 11)
            bins[:] = 0
            for key in range(size):
                offset = bits[row, key] - low
                if offset >= 0 and (offset >> shift) < 2048:
                    bins[offset >> shift] += 1
            place, above = 2047, 0
            while place > 0 and above + bins[place] < wanted:
                above += bins[place]
                place -= 1
            short = above + bins[place] < wanted  # fewer than `count` are not negative
            wanted -= above
            low += place << shift
            width = shift
        least = -1 if short else low
        level = size if short else wanted
        found = 0
        for key in range(size):
            value = bits[row, key]
            if value > least or (value == least and level > 0 and not short):
                level -= value == least
                out[row, found] = key
                found += 1


_best: Any = numba.njit(nogil=True, boundscheck=False)(_best_rows)
