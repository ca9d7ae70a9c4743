"""Lists of the pages that tiles attend to, compiled from an expression.

Near a tile its pages are listed one by one. Farther away most patterns repeat: there the lists of
all tiles whose numbers are equal modulo a period are parts of one list, which is made once. A
tile's list is put together from both. Neither time nor memory grows with the number of tiles times
that of pages, but with the length of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.errors import PatternError
from kernels.page import PAGE
from kernels.patterns.looks import MOST as MASKS
from kernels.patterns.looks import WHOLE, Looks
from kernels.patterns.places import Places
from kernels.patterns.random_blocks import Random
from kernels.patterns.view import FOREVER, View
from kernels.tiles import TileSelection

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.expression import Expression

AT_ONCE = 1 << 18
"""Pairs of a tile and a page that are looked at together."""
MOST = 1 << 21
"""Pairs that are looked at in all; it takes about a second where all of them differ."""
SPARSE = 32
"""Pages for each that a row may see, up to which a table marks them; else they are sorted."""
Slice = tuple["Tensor", "Tensor", "Tensor"]


@dataclass(frozen=True, slots=True)
class Lists:
    """For each tile up to six slices of places, one behind the other: its list of pages."""

    places: Places  # those seen whole, then the others
    begins: Tensor  # int64 [tiles, slices]
    ends: Tensor  # int64 [tiles, slices]
    whole: int  # so many slices, the first ones, are of pages seen whole

    @property
    def pairs(self) -> Tensor:
        """How many pairs of a query and a key each tile's list holds, int64 [tiles]."""
        before = F.pad(self.places.seen.cumsum(0), (1, 0))
        return (before[self.ends] - before[self.begins]).sum(1)

    def selection(self, kv_heads: int) -> TileSelection:
        """The lists laid out, for KV heads that share them."""
        lengths = self.ends - self.begins  # [tiles, slices]
        counts = lengths.sum(1)  # [tiles]
        starts = counts.cumsum(0) - counts

        def shared(part: Tensor) -> Tensor:
            return part[:, None].expand(-1, kv_heads)

        bits = self.places.bits
        pages, masks = self._laid_out(lengths)
        return TileSelection(
            starts=shared(starts),
            counts=shared(counts.int()),
            whole=shared(lengths[:, : self.whole].sum(1).int()),
            pages=pages,
            masks=masks,
            bits=bits if len(bits) else bits.new_zeros(1, PAGE),
        )

    def _laid_out(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Pages and masks of all slices, int32 [places] each; there may be a hundred million.

        Args:
            lengths: int64 [tiles, slices].
        """
        filled = lengths.flatten().nonzero()[:, 0]
        begins, lengths = self.begins.flatten()[filled], lengths.flatten()[filled]
        ends = F.pad(lengths.cumsum(0), (1, 0))  # int64 [filled + 1]
        # From a place to the next the source moves by one, and where a slice begins it jumps.
        jumps = F.pad(begins[1:] - (begins + lengths)[:-1] + 1, (1, 0)).int()
        total = int(ends[-1])
        page, mask = self.places.page, self.places.mask.clamp_min(0)
        pages, masks = page.new_empty(total), mask.new_empty(total)
        edge = torch.arange(0, total, AT_ONCE, device=ends.device)
        cuts = [*torch.unique(torch.searchsorted(ends, edge)).tolist(), len(filled)]
        for since, until in pairwise(cuts):
            begin, end = int(ends[since]), int(ends[until])
            moves = page.new_ones(end - begin)
            moves[ends[since:until] - begin] = jumps[since:until]
            moves[:1] = begins[since]
            source = moves.cumsum(0, dtype=torch.int32)
            torch.index_select(page, 0, source, out=pages[begin:end])
            torch.index_select(mask, 0, source, out=masks[begin:end])
        return pages, masks


def compile_lists(
    expression: Expression,
    causal: bool,
    first: int,
    queries: int,
    keys: int,
    device: torch.device | str,
) -> Lists:
    """The lists of the tiles that queries lie in; see `kernels.patterns.pattern.Pattern.tiles`.

    Raises:
        PatternError: `first` is no multiple of 64, or too many pages would have to be looked at.
    """
    if first % PAGE:
        raise PatternError(f"a prompt's tiles begin at a multiple of {PAGE}, not at {first}")
    looks = Looks(expression, causal, first + queries, keys)
    begin, end, pages = first // PAGE, -(-looks.end // PAGE), -(-keys // PAGE)
    drawn = sum(min(one.count, pages) for one in expression.primitives if isinstance(one, Random))
    if drawn * (end - begin) > MOST:
        raise _too_much(keys)
    tile = torch.arange(begin, end, device=device)
    # Tiles from `even` to `cut` are like each other: not the first ones perhaps, nor one in which
    # the queries end.
    far = expression.far(causal, max(looks.end, keys))
    even = min(max(begin, far.first), end)
    cut = max(looks.end // PAGE, even)
    # A query sees no later key, so that its own page never looks like others.
    period, reach = far.period, max(far.reach, 1)
    regular = (tile >= even) & (tile < cut)
    if not 0 < period <= (cut - even) // 2 or reach >= pages:
        period, regular = 0, torch.zeros_like(regular)
    before = (tile - reach + 1).clamp(0, pages).where(regular, 0)
    after = (tile + reach).clamp_max(pages).where(regular, pages)
    # What the last ones see far before them holds what the others do, and what the first ones see
    # far behind them. These lists come first, then each tile's own.
    start, stop = torch.zeros_like(tile), torch.full_like(tile, pages)
    left = ((tile - cut) % max(period, 1), start, before)  # a slice: row, pages from, and up to
    right = ((tile - even) % max(period, 1) + period, after, stop)
    own = (tile - begin + 2 * period, before, after)
    parts = []
    for some, since, until in (
        (left, cut - period, cut),
        (right, even, even + period),
        (own, begin, even),
        (own, even, cut),
        (own, cut, end),
    ):
        part = slice(since - begin, until - begin)
        parts += _listed(looks, tile[part], *(each[part] for each in some))
    return _sliced(Places.join(parts, device), [left, own, right], pages)


def _listed(looks: Looks, tile: Tensor, row: Tensor, begin: Tensor, end: Tensor) -> list[Places]:
    """The pages from `begin` up to `end` that tiles see, as places of the given rows."""
    if not len(tile):
        return []
    view = _view(looks, tile, begin, end)
    columns, width = looks.expression.cover(view).columns, -(-view.span // PAGE)
    at_once = max(1, AT_ONCE // max(columns, min(width, SPARSE * columns), 1))
    found = []
    total = made = 0
    for some in torch.split(torch.arange(len(tile), device=tile.device), at_once):
        view = _view(looks, tile[some], begin[some], end[some])
        which, page = _pages(looks.expression, view)
        total += len(which)
        if total > MOST:
            raise _too_much(looks.keys)
        which = some.index_select(0, which)
        mask, seen, bits = looks.at(tile.index_select(0, which), page)
        made += len(bits)
        if made > MASKS:
            raise _too_much(looks.keys)
        places = Places(row.index_select(0, which).int(), page.int(), mask, seen, bits)
        found.append(places.take((seen > 0).nonzero()[:, 0]))
    return found


def _too_much(keys: int) -> PatternError:
    return PatternError(
        f"what this pattern shows of {keys} tokens repeats too late, if at all: more than {MOST} "
        "pages would have to be looked at one by one; write strides, blocks and rows that are "
        "multiples of 64 or share large factors, fewer random blocks, or take fewer tokens"
    )


def _view(looks: Looks, tile: Tensor, begin: Tensor, end: Tensor) -> View:
    """Tiles as rows of queries, and the keys of the pages that may be listed."""
    first, low = tile[:, None] * PAGE, begin[:, None] * PAGE
    high = (end[:, None] * PAGE - 1).clamp_max(looks.keys - 1)
    if looks.causal:
        high = torch.minimum(high, first + (PAGE - 1))
    return View(
        first=first,
        low=low,
        high=high,
        size=PAGE,
        span=max(int((high - low).max()) + 1, 0),
        earliest=int(tile[0]) * PAGE,
        latest=max(looks.keys - 1, int(tile[-1]) * PAGE),
        causal=looks.causal,
    )


def _pages(expression: Expression, view: View) -> tuple[Tensor, Tensor]:
    """The pages in which the rows of a view may see keys: the row and the page of each place."""
    units = expression.cover(view).units()  # [rows, columns]
    begin, width = view.low // PAGE, -(-view.span // PAGE)
    if width <= SPARSE * units.shape[1]:
        place = (units - begin).clamp_max_(width)  # what is none lies behind the last
        there = torch.zeros(len(units), width + 1, dtype=torch.bool, device=units.device)
        row, place = there.scatter_(1, place, True)[:, :width].nonzero(as_tuple=True)
        return row, place.add_(begin[:, 0].index_select(0, row))
    units = units.sort(dim=1).values
    there = units < FOREVER
    there[:, 1:] &= units[:, 1:] != units[:, :-1]
    row, place = there.nonzero(as_tuple=True)
    return row, units[row, place]


def _sliced(places: Places, slices: list[Slice], pages: int) -> Lists:
    """Lists of slices of places: first of those seen whole, then of the others.

    Args:
        places: by row and page.
        slices: which row, from which page, and up to which, of every tile.
        pages: how many pages there are.
    """
    order = places.row.long() * pages + places.page  # int64 [places], ascending
    whole = places.mask == WHOLE
    picked, begins, ends, before = [], [], [], 0
    for which in (whole, ~whole):
        picked.append(which.nonzero()[:, 0])
        here = order[which]
        for row, low, high in slices:
            begins.append(torch.searchsorted(here, row * pages + low) + before)
            ends.append(torch.searchsorted(here, row * pages + high) + before)
        before += len(here)
    return Lists(
        places=places.take(torch.cat(picked)),
        begins=torch.stack(begins, dim=1),
        ends=torch.stack(ends, dim=1),
        whole=len(slices),
    )
