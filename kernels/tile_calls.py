"""Which lists of pages one call of an attention kernel can take together.

A call costs as much as some pages do. So tiles and heads whose lists are the same make one call
over one copy of the keys, as all tiles of dense attention do; and lists that are as long as each
other, and hide the same keys, share a call as far as their copies stay in a core's cache.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kernels.tiles import TileSelection

CALL_BYTES = 4 << 20
"""Copies of keys and values in one call: what a core's second cache holds, about."""
Call = tuple[list[tuple[int, "Reads"]], "Tensor"]


@dataclass(frozen=True, slots=True)
class Reads:
    """What a list holds."""

    pages: tuple[int, ...]  # logical; those seen in part are the last ones
    masks: tuple[int, ...]  # of the pages seen in part
    cut: bool  # the last page is seen up to the last key by all queries, and needs no mask


def calls(selection: TileSelection, last: int | None, used: int, page_bytes: int) -> Iterator[Call]:
    """The calls that attend to all lists.

    Args:
        selection: the lists.
        last: the page that the keys end in, if they fill it only in part.
        used: how many keys it has.
        page_bytes: bytes of one page of one head.

    Yields:
        The KV head and the list of each copy, and int64 [copies, tiles, 2], the KV head and the
        tile of each tile of queries that reads it.
    """
    single: dict[tuple[int, tuple[int, ...], bool], list[tuple[int, int, Reads]]] = defaultdict(
        list
    )
    shared: dict[tuple[Reads, tuple[int, ...]], list[int]] = defaultdict(list)
    for (head, reads), tiles in _by_list(selection, last, used).items():
        if len(tiles) == 1:
            alike = (len(reads.pages), reads.masks, reads.cut)
            single[alike].append((tiles[0], head, reads))
        else:
            shared[reads, tuple(tiles)].append(head)
    for (reads, places), heads in shared.items():
        together = _together(len(reads.pages), page_bytes)
        for begin in range(0, len(heads), together):
            some = heads[begin : begin + together]
            place = [[(head, tile) for tile in places] for head in some]
            yield [(head, reads) for head in some], torch.tensor(place)
    for (length, _, _), lists in single.items():
        lists.sort(key=lambda one: one[:2])  # tile by tile, so that keys are read again soon
        together = _together(length, page_bytes)
        for begin in range(0, len(lists), together):
            part = lists[begin : begin + together]
            place = [[(head, tile)] for tile, head, _ in part]
            yield [(head, reads) for _, head, reads in part], torch.tensor(place)


def _together(pages: int, page_bytes: int) -> int:
    return max(1, CALL_BYTES // (pages * page_bytes))


def _by_list(
    selection: TileSelection, last: int | None, used: int
) -> dict[tuple[int, Reads], list[int]]:
    """The tiles of each KV head that have a list in common; of empty lists there are none."""
    logical, masks = selection.pages.tolist(), selection.masks.tolist()
    tails = _tails(selection, used) if last is not None else frozenset()
    most = selection.counts.shape[0] - 1
    found: dict[tuple[int, Reads], list[int]] = defaultdict(list)
    known: dict[tuple[int, int, int, bool], Reads] = {}
    rows = zip(
        selection.starts.tolist(), selection.counts.tolist(), selection.whole.tolist(), strict=True
    )
    for tile, row in enumerate(rows):
        for head, (start, count, whole) in enumerate(zip(*row, strict=True)):
            if not count:
                continue
            at = (start, count, whole, tile == most)
            if at not in known:
                pages = tuple(logical[start : start + count])
                partly = tuple(masks[start + whole : start + count])
                cut = len(partly) == 1 and pages[-1] == last and (partly[0], tile == most) in tails
                known[at] = Reads(pages, () if cut else partly, cut)
            found[head, known[at]].append(tile)
    return found


def _tails(selection: TileSelection, used: int) -> frozenset[tuple[int, bool]]:
    """The masks by which all queries see the first `used` keys, and whether of the last tile.

    Of the last tile only `used` queries are there.
    """
    plain = selection.bits == (1 << used) - 1  # bool [masks, 64]
    every, some = plain.all(1), plain[:, :used].all(1)
    return frozenset(
        (mask, end)
        for end, which in ((False, every), (True, some))
        for mask in which.nonzero()[:, 0].tolist()
    )
