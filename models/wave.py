"""A CPU's step in parts that follow each other through the layers, a core each.

Each of a step's operations is too short to be worth two cores: waking the second takes as long as
it saves. Its tokens, though, need of each other only keys and values: while later ones are in a
layer, earlier ones can be in the next. A part waits, in each layer, until the keys of those before
it are in the cache, and what a token attends to does not depend on how its step is cut.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import torch

from kernels.cache import Segment
from kernels.page import PAGE
from kernels.prefill import in_tiles
from models.attention import Recorder, TileEntry
from models.step import DenseGroup, StepInput, TileGroup, Turn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from kernels.cache import LayerCache
    from models.decoder import Decoder

MOST = 4
"""Parts of a step: the last one's cores wait at first, and the first one's in the end."""
LEAST = 4 * PAGE
"""Tokens of a part for which it is worth while."""

Group = TypeVar("Group", DenseGroup, TileGroup)


def in_waves(decoder: Decoder) -> Decoder | Wave:
    """The decoder, in waves where that is known to be faster: a CPU whose tile registers attend."""
    config, dtype = decoder.config, decoder.model.embed_tokens.weight.dtype
    plain = config.patterns is None and in_tiles(dtype, config.head_dim, decoder.impl)
    return Wave(decoder) if plain and torch.get_num_threads() > 1 else decoder


def parts_of(model: Decoder | Wave) -> int:
    """In how many parts the model runs a step at the most."""
    return model.parts if isinstance(model, Wave) else 1


class Wave:
    """A decoder whose prompts' steps run in parts, each on its share of torch's threads.

    Args:
        decoder: the model, on a CPU; its attention is `models.attention.LayerAttention`.
        threads: cores to take; by default as many as torch does.
    """

    def __init__(self, decoder: Decoder, threads: int | None = None) -> None:
        threads = torch.get_num_threads() if threads is None else threads
        self.parts = max(1, min(threads, MOST))
        self._decoder = decoder
        self._layers = decoder.config.layers
        # Of the thread that asks: each has as many as it was started with.
        each = partial(torch.set_num_threads, threads // self.parts)
        self._pool = ThreadPoolExecutor(self.parts, "saccade-wave", each)

    def __call__(self, step: StepInput, caches: Sequence[LayerCache], recorder: Recorder) -> Tensor:
        """See `models.decoder.Decoder.forward`."""
        watched = recorder.phases.on or recorder.explain
        parts = [] if watched or self.parts == 1 else _cut(step, self.parts)
        if len(parts) < 2:
            hidden: Tensor = self._decoder(step, caches, recorder)
            return hidden
        notes = [Recorder() for _ in parts]
        turns: list[Turn] = []
        for _ in parts:
            done = tuple(Event() for _ in range(self._layers))
            turns.append(Turn(done, turns[-1] if turns else None))
        found = [
            self._pool.submit(self._run, replace(part, turn=turn), caches, note)
            for part, turn, note in zip(parts, turns, notes, strict=True)
        ]
        wait(found)
        outputs = [one.result() for one in found]
        _note(step, parts, notes, recorder)
        return torch.cat(outputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `models.decoder.Decoder.logits`."""
        return self._decoder.logits(hidden)

    def _run(self, step: StepInput, caches: Sequence[LayerCache], recorder: Recorder) -> Tensor:
        assert step.turn is not None
        try:
            with torch.inference_mode():  # which is a thread's own
                hidden: Tensor = self._decoder(step, caches, recorder)
                return hidden
        finally:
            for done in step.turn.done:  # where it failed others wait for it
                done.set()


def _cut(step: StepInput, parts: int) -> list[StepInput]:
    """The step's tokens in at most so many parts, one behind the other; none: it stays whole."""
    tokens = len(step.token_ids)
    parts = min(parts, tokens // LEAST)
    edges = _edges(step)
    if parts < 2 or not edges:
        return []
    cuts = {
        min(edges, key=lambda edge: abs(edge - tokens * part // parts)) for part in range(1, parts)
    }
    bounds = [0, *sorted(cuts - {0, tokens}), tokens]
    found = [_part(step, begin, end) for begin, end in pairwise(bounds)]
    whole = [part for part in found if part is not None]
    return whole if len(whole) == len(found) else []


def _edges(step: StepInput) -> list[int]:
    """Places in the step at which it may be cut: where segments begin or end, or their pages do."""
    edges = set()
    groups: tuple[DenseGroup | TileGroup, ...] = (*step.dense, *step.tiled)
    for group in groups:
        start, tokens = group.segment.start, group.segment.tokens
        inside = range(-start % PAGE, tokens, PAGE)
        edges |= {group.first, group.first + tokens, *(group.first + place for place in inside)}
    return sorted(edges)


def _part(step: StepInput, begin: int, end: int) -> StepInput | None:
    """The step's tokens from place `begin` to `end`; None: some of a group's rows are others."""
    rows = [group for group in (step.alone, *step.sparse) if group is not None]
    inside = [(group.tokens >= begin) & (group.tokens < end) for group in rows]
    if any(bool(some.any()) and not bool(some.all()) for some in inside):
        return None
    slots = step.slots[begin:end]
    alone = step.alone
    if alone is not None:
        alone = replace(alone, tokens=alone.tokens - begin) if bool(inside.pop(0).any()) else None
    return StepInput(
        token_ids=step.token_ids[begin:end],
        positions=step.positions[begin:end],
        slots=slots,
        filled=slots[slots % PAGE == PAGE - 1] // PAGE,
        dense=tuple(_pieces(step.dense, begin, end)),
        alone=alone,
        sparse=tuple(
            replace(group, tokens=group.tokens - begin)
            for group, some in zip(step.sparse, inside, strict=True)
            if bool(some.any())
        ),
        tiled=tuple(_pieces(step.tiled, begin, end)),
    )


def _pieces(groups: Iterable[Group], begin: int, end: int) -> Iterator[Group]:
    """What of some groups lies from place `begin` to `end`."""
    for group in groups:
        segment, first = group.segment, max(group.first, begin)
        count = min(group.first + segment.tokens, end) - first
        if count == segment.tokens:
            yield replace(group, first=first - begin)
        elif count > 0:
            table, device = segment.block_table.tolist(), segment.block_table.device
            piece = Segment.of(table, segment.start + first - group.first, count, device)
            yield replace(group, segment=piece, first=first - begin)


def _note(
    step: StepInput, parts: Sequence[StepInput], notes: Sequence[Recorder], recorder: Recorder
) -> None:
    """Bring the parts' notes together, as if the step had been one."""
    tiles: defaultdict[int, list[list[TileEntry]]] = defaultdict(list)  # by the group's first token
    begin = 0
    for part, note in zip(parts, notes, strict=True):
        recorder.entries.extend(replace(one, tokens=one.tokens + begin) for one in note.entries)
        for piece in part.tiled:
            place = begin + piece.first
            first = max(group.first for group in step.tiled if group.first <= place)
            tiles[first].append([one for one in note.tiles if one.first == piece.first])
        begin += len(part.token_ids)
    for first, pieces in tiles.items():
        for layer in zip(*pieces, strict=True):
            density = torch.cat([one.density for one in layer])
            recorder.tiles.append(
                TileEntry(first, density, torch.cat([one.coverage for one in layer]))
            )
