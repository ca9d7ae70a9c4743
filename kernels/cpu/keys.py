"""The cache and the rows as numba takes them: arrays in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kernels.budget import FAR
from kernels.codes import FLOAT8, FOURS, words
from kernels.cpu.launch import inlined, jit
from kernels.page import PAGE
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows


class Keys(NamedTuple):
    """The cache and the rows, as arrays; numbers are float32, bfloat16 as uint16, float8 as uint8.

    What belongs to a page stands at its number, those of the first KV head in front.
    """

    kv: Any  # [kv_heads * pages * 64 * 2, head_dim]  a key and its value, key after key
    centre: Any  # float8 [kv_heads * pages, head_dim]
    codes: Any  # uint32 [kv_heads * pages, 16, words, 4]
    scale: Any  # float8 [kv_heads * pages, 64], by fours
    tables: Any  # int64 [sequences, pages]
    lengths: Any  # int64 [rows]
    starts: Any  # int64 [rows]
    queries: int  # rows of each sequence
    pages: int  # of each KV head
    slopes: Any  # float32 [heads], what each position is worth (`kernels.alibi`); [0]: nothing


class Place(NamedTuple):
    """One row and KV head. Coded keys are numbered from the first page of a segment."""

    head: int  # the KV head
    row: int
    start: int  # position of the first key that the row sees
    sinks: int  # position behind the last sink that it sees; without one, `start`
    first: int  # page that the numbers begin with
    low: int  # number of the first free key: one that is not always read
    coded: int  # number behind the last free key: where the recent window begins
    since: int  # position of the first recent key that the row sees
    length: int  # position behind the last
    apart: int  # one page of so many is probed


@jit
def place_of(keys: Keys, head: int, row: int, sinks: int) -> Place:
    """Where the keys of a row and KV head lie."""
    start, length = keys.starts[row], keys.lengths[row]
    first, recent = start // (SEGMENT * 64) * SEGMENT, max(length // 64 - 1, 0)
    coded = max(recent - first, 0) * 64
    low = min(max(start, sinks) - first * 64, coded)
    since = max(start, recent * 64)
    visible = length - start
    apart = 1 if visible < FAR else 2 if visible < 2 * FAR else 4
    end = max(start, min(sinks, recent * 64))
    return Place(head, row, start, end, first, low, coded, since, length, apart)


@jit
def pages_of(keys: Keys, place: Place, first: int, last: int) -> Any:
    """The pages of segments `first` to `last` that hold a free key: the first, where all lie.

    The second is int64 [pages].
    """
    low = max(first * SEGMENT, place.low // 64)
    high = min(last * SEGMENT, place.coded // 64)
    pages = np.empty(max(high - low, 0), np.int64)
    for index in range(pages.shape[0]):
        cached = keys.tables[place.row // keys.queries, place.first + low + index]
        pages[index] = cached + place.head * keys.pages
    return low, pages


@jit
def kept_of(place: Place) -> Any:
    """Positions of the keys that are always read: int64 [kept]."""
    sinks = place.sinks - place.start
    kept = np.empty(sinks + place.length - place.since, np.int64)
    for index in range(sinks):
        kept[index] = place.start + index
    for index in range(sinks, kept.shape[0]):
        kept[index] = place.since + index - sinks
    return kept


@jit
def slots_of(keys: Keys, head: int, row: int, positions: Any) -> Any:
    """Where the keys at `positions` [n] lie: int64 [n]."""
    slots = np.empty(positions.shape[0], np.int64)
    sequence, offset = row // keys.queries, head * keys.pages
    for place in range(positions.shape[0]):
        position = positions[place]
        page = keys.tables[sequence, position >> 6] + offset
        slots[place] = page * 64 + (position & 63)
    return slots


@jit
def fall(keys: Keys, place: Place, positions: Any, out: Any, offset: int) -> None:
    """Add what distance is worth to scores.

    Args:
        keys: see there.
        place: the row and KV head.
        positions: int64 [n], of keys.
        out: float32 [group, ..], in and out: the keys' scores, from `offset` on.
        offset: see there.
    """
    if keys.slopes.shape[0] == 0:
        return
    for head in range(out.shape[0]):
        slope = keys.slopes[place.head * out.shape[0] + head]
        for index in range(positions.shape[0]):
            out[head, offset + index] += slope * np.float32(positions[index] - (place.length - 1))


@inlined
def key_of(place: Any) -> Any:
    """A page's key at a place in the order of its codes (`kernels.codes`)."""
    return place & 32 | (place & 3) << 3 | place >> 2 & 7


@jit
def fall_in_page(keys: Keys, place: Place, out: Any) -> None:
    """Add what distance from a page's first key is worth to its scores [group, 64], by fours."""
    if keys.slopes.shape[0] == 0:
        return
    for head in range(out.shape[0]):
        slope = keys.slopes[place.head * out.shape[0] + head]
        for key in range(64):
            out[head, key] += slope * np.float32(key_of(key))


@jit
def fall_of_pages(keys: Keys, place: Place, low: int, pages: int, centre: Any, offset: int) -> None:
    """Add what distance from a row to pages' first keys is worth to the scores of their centres.

    Args:
        keys: see there.
        place: the row and KV head.
        low: the first page, as `place` numbers them.
        pages: how many.
        centre: float32 [group, ..], in and out, from `offset` on.
        offset: see there.
    """
    if keys.slopes.shape[0] == 0:
        return
    for head in range(centre.shape[0]):
        slope = keys.slopes[place.head * centre.shape[0] + head]
        for index in range(pages):
            distance = (place.first + low + index) * 64 - (place.length - 1)
            centre[head, offset + index] += slope * np.float32(distance)


def arrays(cache: LayerCache, rows: Rows) -> Keys:
    """The cache and rows as numba takes them."""
    head_dim = cache.head_dim
    return Keys(
        numbers(cache.kv.view(-1, head_dim)),
        numbers(cache.centre.view(-1, head_dim)),
        cache.codes.view(-1, FOURS, words(head_dim), 4).numpy().view(np.uint32),
        numbers(cache.scale.view(-1, PAGE)),
        rows.block_tables.contiguous().numpy(),
        rows.lengths.contiguous().numpy(),
        rows.starts.contiguous().numpy(),
        rows.queries,
        cache.kv.shape[1],
        (torch.empty(0) if cache.slopes is None else cache.slopes).contiguous().numpy(),
    )


def numbers(tensor: Tensor) -> Any:
    """A tensor's numbers in place, of bfloat16 and float8 the bits."""
    bits = {torch.bfloat16: torch.uint16, FLOAT8: torch.uint8}
    return tensor.contiguous().view(bits.get(tensor.dtype, tensor.dtype)).numpy()
