"""ALiBi's slopes: how much a score loses for each position that a key lies behind the query."""

from __future__ import annotations


def slopes(heads: int, most: float = 8.0) -> tuple[float, ...]:
    """The slopes of a layer's heads (Press et al. 2022, "Train Short, Test Long").

    Of 2 ** m heads they are a geometric sequence that ends with 2 ** -most. Other numbers of heads
    have those of the next smaller power of two, and then every second one of the next greater.

    Args:
        heads: query heads, at least one.
        most: negated log2 of the last slope.
    """

    def sequence(count: int) -> list[float]:
        return [2.0 ** (-most * (head + 1) / count) for head in range(count)]

    count = 1 << (heads.bit_length() - 1)
    more = sequence(2 * count)[::2]
    return tuple((sequence(count) + more)[:heads])
