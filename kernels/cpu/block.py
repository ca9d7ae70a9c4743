"""A block of 32 queries of a head: the scores of keys, and their values added by them.

Scores stand transposed, a key's in a row, so that what is done to each query is done in vectors.
Dao 2023, "FlashAttention-2", a few pages at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels.cpu.amx import multiply, turn
from kernels.cpu.launch import jit
from kernels.cpu.number import bits, long_vectors, number, small_power

if TYPE_CHECKING:
    from kernels.cpu.prompt import Prompt

AT_ONCE = 8
"""Pages whose scores are computed, and then their values added: outputs are loaded less often."""
LOG2E = np.float32(1 / math.log(2))
_LN2 = np.float32(math.log(2))
_ZERO, _ONE, _NONE = np.float32(0), np.float32(1), np.float32(-np.inf)


class Work(NamedTuple):
    """What one block of queries has come to. In front the blocks of a tile and KV head."""

    query: Any  # uint32 [blocks, head_dim / 2 * 32]  pairs of channels
    variance: Any  # float32 [blocks, 32]
    most: Any  # float32 [blocks, 32]  greatest score
    total: Any  # float32 [blocks, 32]  of e ** (score - most)
    output: Any  # float32 [blocks, head_dim * 32]
    score: Any  # float32 [AT_ONCE * 64, 32]
    weight: Any  # uint32 [AT_ONCE * 32, 32]  pairs of keys, e ** (score - most)
    value: Any  # int64 [AT_ONCE]  where the values begin
    here: Any  # int64 [1], 0


@jit
def load_queries(prompt: Prompt, tile: int, head: int, work: Work, rows: Any) -> None:
    """A tile's queries of a KV head, and nothing seen yet."""
    long_vectors()
    tokens, _heads, head_dim = prompt.query.shape
    blocks = work.query.shape[0]
    first = (prompt.start // 64 + tile) * 64 - prompt.start
    spread = prompt.spread[head, tile] * prompt.scale * prompt.scale
    for block in range(blocks):
        token = first + block % 2 * 32
        number_of = head * (blocks // 2) + block // 2
        for row in range(32):
            square = _ZERO
            if 0 <= token + row < tokens:
                for channel in range(head_dim):
                    value = prompt.query[token + row, number_of, channel]
                    rows[row, channel] = value
                    square += number(value) * number(value)
            else:
                rows[row, :] = 0
            work.variance[block, row] = square * spread
        for channel in range(0, head_dim, 32):
            for row in range(0, 32, 16):
                turn(
                    rows, row * head_dim + channel, 2 * head_dim,
                    work.query, block * head_dim * 16 + channel * 16 + row, 128,
                )  # fmt: skip
        work.most[block, :] = _NONE
        work.total[block, :] = _ZERO
        work.output[block, :] = _ZERO


@jit
def score_keys(work: Work, block: int, place: int, keys: Any, at: int, row: int) -> None:
    """Products of a block's queries and 64 keys, whose rows lie `row` bytes apart."""
    each = work.query.shape[1]
    for key in range(0, 64, 32):
        multiply(
            keys, at + key * (row // 2), work.here, 1, row, each // 512,
            work.query, block * each, work.score, (place * 64 + key) * 32, 0,
        )  # fmt: skip


@jit
def hide_keys(work: Work, place: int, words: Any, first: int) -> None:
    """Hide the keys that a block's queries do not see, by the bits of `words` [64]."""
    long_vectors()
    for key in range(64):
        for row in range(32):
            seen = words[first + row] >> key & 1
            score = work.score[place * 64 + key, row]
            work.score[place * 64 + key, row] = score if seen != 0 else _NONE


@jit
def add_values(
    work: Work, block: int, many: int, values: Any, scale: Any, more: Any, counted: bool
) -> None:
    """Add values by the scores at hand, times `scale` and `more` [32] added to each.

    Args:
        work: see there.
        block: see there.
        many: times 64 values are added.
        values: uint16 [.., head_dim * 64], transposed.
        scale: factor on the scores.
        more: float32 [32].
        counted: whether their weights count in the total.
    """
    long_vectors()
    score, weight = work.score, work.weight
    peak = np.full(32, _NONE, np.float32)
    for key in range(0, many * 64, 4):
        for row in range(32):
            one, two = score[key, row], score[key + 1, row]
            three, four = score[key + 2, row], score[key + 3, row]
            one = one if one > two else two
            three = three if three > four else four
            one = one if one > three else three
            peak[row] = one if one > peak[row] else peak[row]
    moved = 0
    shift, less = np.empty(32, np.float32), np.empty(32, np.float32)
    most, total = work.most[block], work.total[block]
    for row in range(32):
        high = peak[row] * scale + more[row]
        before = most[row]
        high = high if high > before else before
        base = high if high > _NONE else _ZERO
        moved |= high > before
        most[row] = high
        shift[row] = more[row] - base
        less[row] = small_power(before - base)
    if moved:
        output = work.output[block]
        for channel in range(output.shape[0] // 32):
            for row in range(32):
                output[channel * 32 + row] *= less[row]
        for row in range(32):
            total[row] *= less[row]
    added = np.zeros(32, np.float32)
    for pair in range(many * 32):
        for row in range(32):
            one = small_power(score[2 * pair, row] * scale + shift[row])
            two = small_power(score[2 * pair + 1, row] * scale + shift[row])
            added[row] += one + two
            low, high = bits(one) + np.int32(0x8000), bits(two) + np.int32(0x8000)
            weight[pair, row] = np.uint32(low) >> np.uint32(16) | np.uint32(high) & np.uint32(
                0xFFFF0000
            )
    if counted:
        for row in range(32):
            total[row] += added[row]
    channels = values.shape[1] // 64
    for channel in range(0, channels, 32):
        multiply(
            values, channel * 64, work.value, many, 128, 2,
            weight, 0, work.output, (block * channels + channel) * 32, 1,
        )  # fmt: skip


@jit
def write_lse(prompt: Prompt, tile: int, head: int, work: Work, out: Any) -> None:
    """Write the log-sum-exps of what has been seen."""
    blocks = work.query.shape[0]
    first = (prompt.start // 64 + tile) * 64 - prompt.start
    for block in range(blocks):
        for row in range(32):
            token = first + block % 2 * 32 + row
            if 0 <= token < out.shape[0]:
                sum_ = np.log(work.total[block, row]) + work.most[block, row] * _LN2
                out[token, head * (blocks // 2) + block // 2] = sum_


@jit
def write_output(prompt: Prompt, tile: int, head: int, work: Work, rows: Any, out: Any) -> None:
    """Write the outputs."""
    long_vectors()
    tokens, _heads, head_dim = prompt.query.shape
    blocks = work.query.shape[0]
    first = (prompt.start // 64 + tile) * 64 - prompt.start
    for block in range(blocks):
        for channel in range(0, head_dim, 16):
            for row in range(0, 32, 16):
                turn(
                    work.output, (block * head_dim + channel) * 32 + row, 128,
                    rows, row * head_dim + channel, 4 * head_dim,
                )  # fmt: skip
        for row in range(32):
            token = first + block % 2 * 32 + row
            if 0 <= token < tokens:
                total = work.total[block, row]
                part = _ONE / total if work.most[block, row] > _NONE else _ZERO
                for channel in range(head_dim):
                    out[token, head * (blocks // 2) + block // 2, channel] = (
                        rows[row, channel] * part
                    )
