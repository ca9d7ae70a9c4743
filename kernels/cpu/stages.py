"""The stages of a selection: what `kernels.cpu.select` runs on threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.cpu.budget import spend
from kernels.cpu.keys import kept_of, place_of
from kernels.cpu.launch import entry, sources
from kernels.cpu.probe import probe_pages, probes_of, score_kept
from kernels.cpu.sample import draw_keys
from kernels.cpu.scan import level_query, load_query
from kernels.page import PAGE
from kernels.sample import SEGMENT

if TYPE_CHECKING:
    from kernels.cpu.budget import Budget
    from kernels.cpu.keys import Keys
    from kernels.cpu.work import Work


def _kernels(version: int) -> tuple[Any, Any, Any, Any]:
    """The stages; see `sources` for the version."""

    @entry
    def probe(
        keys: Keys, work: Work, budget: Budget, queries: Any, rotated: Any, scale: Any, _part: int,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        """Segments `start` to `stop` of all units: queries as the scan wants them, a first look."""
        _ = version
        rows, group, segments = queries.shape[0], work.norm.shape[1], work.count.shape[1]
        query = np.empty((group, queries.shape[2]), np.float32)
        planes, level = np.empty_like(work.planes[0]), np.empty_like(work.level[0])
        while start < stop:
            unit, first = start // segments, start % segments
            last = min(first + stop - start, segments)
            head, row = unit // rows, unit % rows
            place = place_of(keys, head, row, budget.sinks)
            load_query(queries, row, head * group, scale, query)
            level_query(query, rotated, planes, level)
            if first == 0:  # one thread's part of a unit
                work.planes[unit], work.level[unit] = planes, level
            probe_pages(
                keys, place, first, last, query, planes, level, work.centre[unit], work.score[unit]
            )
            start += last - first

    @entry
    def settle(
        keys: Keys, work: Work, budget: Budget, queries: Any, scale: Any, _part: int, start: int,
        stop: int,
    ) -> None:  # fmt: skip
        """Units `start` to `stop`: the norm and the number of marks."""
        _ = version
        rows, group = queries.shape[0], work.norm.shape[1]
        query = np.empty((group, queries.shape[2]), np.float32)
        for unit in range(start, stop):
            head, row = unit // rows, unit % rows
            place = place_of(keys, head, row, budget.sinks)
            load_query(queries, row, head * group, scale, query)
            score, probes = work.score[unit], probes_of(place)
            always = score_kept(keys, place, query, score, probes)
            work.marks[unit] = spend(place, budget, score, probes, always, work.norm[unit])
            work.always[unit] = always

    @entry
    def draw(keys: Keys, work: Work, budget: Budget, _part: int, start: int, stop: int) -> None:
        """Segments `start` to `stop` of all units: the keys on which marks fall."""
        _ = version
        rows, segments = keys.lengths.shape[0], work.count.shape[1]
        while start < stop:
            unit, first = start // segments, start % segments
            last = min(first + stop - start, segments)
            place = place_of(keys, unit // rows, unit % rows, budget.sinks)
            work.count[unit, first:last] = 0
            if work.marks[unit] > 0:
                work.count[unit, first] = draw_keys(keys, work, unit, place, first, last)
            start += last - first

    @entry
    def pack(
        keys: Keys, work: Work, budget: Budget, indices: Any, weights: Any, counts: Any, _part: int,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        """Units `start` to `stop`: sinks, what was drawn, the recent window."""
        _ = version
        rows, segments = keys.lengths.shape[0], work.count.shape[1]
        for unit in range(start, stop):
            head, row = unit // rows, unit % rows
            place = place_of(keys, head, row, budget.sinks)
            own, weight = indices[row, head], weights[row, head]
            kept, total = kept_of(place), place.sinks - place.start
            own[:total], weight[:total] = kept[:total], 0
            for segment in range(segments):
                begin = segment * SEGMENT * PAGE
                for index in range(begin, begin + work.count[unit, segment]):
                    own[total] = place.first * 64 + work.named[unit, index]
                    weight[total] = work.weight[unit, index]
                    total += 1
            weight[total:] = 0
            for recent in kept[place.sinks - place.start :]:
                own[total] = recent
                total += 1
            own[total:] = -1
            if work.marks[unit] == 0:  # the keys always read may all be finite
                weight[:total] = np.nan
            counts[row, head] = total

    return probe, settle, draw, pack


probe, settle, draw, pack = _kernels(sources())
