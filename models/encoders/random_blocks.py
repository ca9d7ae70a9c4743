"""BigBird's random blocks, as its published code draws them.

Zaheer et al. 2020, "Big Bird"; the rules are those of google-research/bigbird, which transformers
follows. A layer's generator is seeded with its number and draws for all of its heads in turn. At
the lengths 1024, 3072 and 4096 each head draws for a text of the longest length, and of it among
the blocks of the first 1024 tokens; at other lengths among the first 2r + 5 blocks. A block never
draws itself or its neighbours, nor the first block; but at 1024 tokens some may draw the last one,
which all see anyway.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from models.errors import UnsupportedModelError

PLANNED = (1024, 3072, 4096)
"""Lengths of the paper's experiments, in tokens."""
FIRST = 1024
"""Tokens among whose blocks a block draws at these lengths."""
Drawn = tuple[tuple[tuple[int, ...], ...], ...]


@lru_cache(maxsize=256)
def drawn(layer: int, heads: int, blocks: int, size: int, count: int, longest: int) -> Drawn:
    """The blocks that each block sees at random, in one layer.

    Args:
        layer: its number, which is the seed.
        heads: how many there are.
        blocks: of the text, more than 5 + 2 count.
        size: tokens of a block.
        count: random blocks of each.
        longest: tokens of the longest text that the model takes.

    Returns:
        For each head and each block but the first and the last one, `count` blocks.

    Raises:
        UnsupportedModelError: there are too few blocks to draw so many, as in transformers.
    """
    generator = np.random.RandomState(layer)
    if not count:
        return (((),) * (blocks - 2),) * heads
    if blocks * size in PLANNED:
        try:
            rows = [_planned(generator, longest // size, size, count) for _ in range(heads)]
        except ValueError as error:
            raise UnsupportedModelError(
                f"BigBird's rule finds no {count} random blocks of {size} tokens in a text of "
                f"{blocks * size}; use the attention_type original_full."
            ) from error
        found = np.stack(rows)[:, : blocks - 2]
    else:
        found = np.zeros((heads, blocks - 2, count), dtype=np.int32)
        # The last block draws, too, though it sees all: the generator moves on.
        for block in range(1, blocks):
            for head in range(heads):
                row = _near_the_start(generator, block, count)
                if block < blocks - 1:
                    found[head, block - 1] = row
    return tuple(tuple(tuple(map(int, row)) for row in head) for head in found)


def _planned(
    generator: np.random.RandomState, blocks: int, size: int, count: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """int32 [blocks - 2, count], of one head."""
    found = np.zeros((blocks - 2, count), dtype=np.int32)
    middle = np.arange(1, blocks - 1, dtype=np.int32)
    last = FIRST // size - 1 if 2 * size < FIRST else blocks - 1
    for block in range(1, blocks - 1):
        begin, end = block - 2, block
        if block <= 2:
            choice = middle[block + 1 : last]
        elif block >= blocks - 3 or begin > last:
            choice = middle[:last]
        elif end + 1 == last:
            choice = middle[:begin]
        else:
            choice = np.concatenate((middle[:begin], middle[end + 1 : last]))
        found[block - 1] = generator.permutation(choice)[:count]
    return found


def _near_the_start(generator: np.random.RandomState, block: int, count: int) -> list[int]:
    """What one block of one head draws among the first 2 count + 5."""
    end = 2 * count + 5
    illegal = {block - 1, block, block + 1, 0, end - 1}
    if block == 1:
        illegal.add(end - 2)
    if block == end - 2:
        illegal.add(1)
    order = generator.permutation(np.arange(end, dtype=np.int32))
    return [int(one) for one in order if int(one) not in illegal][:count]
