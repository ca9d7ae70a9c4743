"""Where BigBird's tokens look (Zaheer et al. 2020, "Big Bird").

Blocks of queries see blocks of keys: the first and the last block see all and are seen by all, each
block sees itself and its neighbours, and some blocks at random. There are two regimes:

published: what the model was trained with, and what transformers computes in `train()` with no
    dropout: for each layer and head blocks of their own; see `models.encoders.random_blocks`.
transformers_eval: what transformers computes in `eval()`: all random blocks are block 0, which is
    then counted 1 + r times. It is cheaper, and it is not what the model was trained with.

A block that is drawn although it is seen anyway counts twice in transformers, and so it does here;
`models.encoders.sparse` says how. Texts of no more than (5 + 2 r) blocks see all, as in
transformers, where the length is that of the padded text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING

from kernels.page import PAGE
from kernels.patterns.expression import Intersection
from kernels.patterns.full import Full
from kernels.patterns.links import Links
from kernels.patterns.pattern import Pattern
from kernels.patterns.spans import Spans
from kernels.tiles import TileSelection
from models.encoders.random_blocks import drawn
from models.encoders.sparse import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from kernels.patterns.expression import Expression
    from models.encoders.config import EncoderConfig, RandomAttention
    from models.encoders.sparse import Plan
    from models.encoders.texts import Shape

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a model's attention is laid out; see `EncoderConfig`."""

    layers: int
    heads: int
    size: int
    random: int
    longest: int
    sparse_above: int | None  # None: never
    regime: RandomAttention

    @staticmethod
    def of(config: EncoderConfig) -> Blocks:
        """That of a configuration."""
        return Blocks(
            layers=config.layers,
            heads=config.heads,
            size=config.block_size,
            random=config.random_blocks,
            longest=config.max_position,
            sparse_above=None if config.full else config.sparse_above,
            regime=config.random_attention,
        )


@lru_cache(maxsize=32)
def plans(blocks: Blocks, shape: Shape, device: torch.device) -> tuple[Plan, ...]:
    """Where the tokens of texts of one shape look, in each layer.

    Raises:
        UnsupportedModelError: there are too few blocks to draw so many at random.
    """
    if blocks.sparse_above is None or shape.padded <= blocks.sparse_above:
        lists = _pattern(Full(), shape).tiles(0, shape.tokens, shape.tokens, "cpu", blocks.heads)
        return ((Part(lists.to(device)),),) * blocks.layers
    layers = blocks.layers if blocks.regime == "published" else 1
    found = _plans(_parts(blocks, -(-shape.padded // blocks.size)), blocks, shape, layers, device)
    return found * (blocks.layers // layers)


@lru_cache(maxsize=32)
def _parts(blocks: Blocks, count: int) -> tuple[tuple[int, tuple[Rows, ...]], ...]:
    """What blocks see of texts of `count` blocks: all as a set, and what counts more than once.

    Returns:
        How many times a block counts in a part, and for each layer and head, or for all of them,
        the blocks that each block sees.
    """
    if blocks.regime == "transformers_eval":
        tables = [_counted(count, ((0,) * blocks.random,) * (count - 2))]
    else:
        shape = (blocks.heads, count, blocks.size, blocks.random, blocks.longest)
        tables = [
            _counted(count, rows) for layer in range(blocks.layers) for rows in drawn(layer, *shape)
        ]
    found = [(1, tuple(tuple(tuple(sorted(row)) for row in table) for table in tables))]
    counted = {times for table in tables for row in table for times in row.values()}
    found += [
        (times - 1, tuple(_counting(table, times) for table in tables))
        for times in sorted(counted - {1})
    ]
    return tuple(found)


def _counted(count: int, rows: Iterable[Sequence[int]]) -> list[Counter[int]]:
    """How many times each block counts each other one, given those that are drawn at random."""
    every = Counter(range(count))
    middle = []
    for block, random in enumerate(rows, start=1):
        middle.append(Counter({block - 1, block, block + 1, 0, count - 1}) + Counter(random))
    return [every, *middle, every]


def _plans(
    parts: Sequence[tuple[int, Sequence[Rows]]],
    blocks: Blocks,
    shape: Shape,
    layers: int,
    device: torch.device,
) -> tuple[Plan, ...]:
    """A plan for each of so many layers."""
    plans: defaultdict[int, list[Part]] = defaultdict(list)
    for number, (times, rows) in enumerate(parts):
        lists = _compiled(rows, blocks, shape).to(device)
        for layer in range(layers):
            part = slice(layer * len(rows) // layers, (layer + 1) * len(rows) // layers)
            if not number or any(row for table in rows[part] for row in table):
                plans[layer].append(Part(_of_heads(lists, part, blocks.heads), times))
    return tuple(tuple(plans[layer]) for layer in range(layers))


def _counting(table: list[Counter[int]], times: int) -> Rows:
    return tuple(
        tuple(sorted(block for block, counted in row.items() if counted == times)) for row in table
    )


def _compiled(rows: Sequence[Rows], blocks: Blocks, shape: Shape) -> TileSelection:
    """The lists of all layers and heads, as if their queries stood one behind the other."""
    together = lcm(PAGE, blocks.size)
    room = -(-shape.padded // together) * together  # queries of one head
    behind = ((),) * (room // blocks.size - len(rows[0]))
    links = Links(blocks.size, tuple(row for table in rows for row in (*table, *behind)))
    queries = room * len(rows)
    lists = _pattern(links, shape).tiles(0, queries, shape.tokens, "cpu")
    there = -(-shape.tokens // PAGE)
    starts, counts, whole = (
        part.view(len(rows), room // PAGE)[:, :there].T
        for part in (lists.starts, lists.counts, lists.whole)
    )
    return TileSelection(starts, counts, whole, lists.pages, lists.masks, lists.bits)


def _of_heads(lists: TileSelection, part: slice, heads: int) -> TileSelection:
    starts, counts, whole = (
        one[:, part].expand(-1, heads).contiguous()
        for one in (lists.starts, lists.counts, lists.whole)
    )
    mine = TileSelection(starts, counts, whole, lists.pages, lists.masks, lists.bits)
    return mine.longest_first()


def _pattern(expression: Expression, shape: Shape) -> Pattern:
    """With what is padding left out."""
    if shape.spans:
        expression = Intersection((expression, Spans(shape.spans)))
    return Pattern(expression, causal=False)
