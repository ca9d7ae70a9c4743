"""Products of bfloat16 blocks in a processor's tile registers (Intel AMX), and transposed blocks.

Intel, "Intel Architecture Instruction Set Extensions Programming Reference", chapter 3. A tile is
16 rows of 64 bytes. A product's first factor is stored by rows; of the second one two rows lie
side by side, number by number, as pairs in words of 32 bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

BLOCK = 32
"""Rows and columns of the blocks that are multiplied: two tiles each way."""
_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ROW = 4 * BLOCK
"""Bytes of a row of a product, and of its second factor."""
_TILE, _SIDE = 16 * _ROW, 64
"""Bytes from a tile of those to the one below, and to the one beside."""


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there are tile registers for heads of `head_dim` channels."""
    return dtype == torch.bfloat16 and head_dim % BLOCK == 0 and has_tiles()


@lru_cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles and the system lets this process use them."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-bf16")) and torch.cpu._init_amx()


def shape() -> Any:
    """What `configure` takes for eight tiles of 16 rows of 64 bytes: uint8 [64]."""
    given = np.zeros(64, np.uint8)
    given[0] = 1
    given[16:32].view(np.uint16)[:] = 64
    given[48:56] = 16
    return given


def _multiply(
    _typing: Any, a: Any, _a: Any, spots: Any, _many: Any, _row: Any, _steps: Any, b: Any,
    _b: Any, out: Any, _out: Any, _more: Any,
) -> Any:  # fmt: skip
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        left, right, total = (
            _pointer(context, builder, kinds[n], *arguments[n : n + 2]) for n in (0, 6, 8)
        )
        (given, many, row, steps), more = arguments[2:6], arguments[10]
        size = _LONG(context.get_abi_sizeof(context.get_data_type(kinds[0].dtype)))
        starts = context.make_array(kinds[2])(context, builder, given).data
        wide = _LONG(_ROW)
        places = [builder.gep(total, [_LONG(n // 2 * _TILE + n % 2 * _SIDE)]) for n in range(4)]

        def load(tile: int, place: Any, stride: Any = wide) -> None:
            _call(builder, "tileloadd64", _BYTE(tile), place, stride)

        with builder.if_else(builder.icmp_signed("!=", more, more.type(0))) as (on, new):
            with on:
                for tile, place in enumerate(places):
                    load(tile, place)
            with new:
                for tile in range(4):
                    _call(builder, "tilezero", _BYTE(tile))
        with for_range(builder, many) as outer, for_range(builder, steps) as inner:
            start = builder.mul(builder.load(builder.gep(starts, [outer.index])), size)
            one = builder.add(start, builder.mul(inner.index, _LONG(_SIDE)))
            two = builder.add(builder.mul(outer.index, steps), inner.index)
            one = builder.gep(left, [one])
            two = builder.gep(right, [builder.mul(two, _LONG(_TILE))])
            load(4, one, row)
            load(5, builder.gep(one, [builder.mul(row, _LONG(16))]), row)
            load(6, two)
            load(7, builder.gep(two, [_LONG(_SIDE)]))
            for tile in range(4):
                factors = _BYTE(4 + tile // 2), _BYTE(6 + tile % 2)
                _call(builder, "tdpbf16ps", _BYTE(tile), *factors)
        for tile, place in enumerate(places):
            _call(builder, "tilestored64", _BYTE(tile), place, wide)
        return context.get_dummy_value()

    long = types.int64
    return types.none(a, long, spots, long, long, long, b, long, out, long, long), generate


def _turn(_typing: Any, source: Any, _from: Any, _row: Any, out: Any, _to: Any, _out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, row = signature.args, ir.VectorType(_WORD, 16)
        start, end = (_pointer(context, builder, kinds[n], *arguments[n : n + 2]) for n in (0, 3))

        def rows(base: Any, stride: Any) -> list[Any]:
            spots = [builder.gep(base, [builder.mul(stride, _LONG(n))]) for n in range(16)]
            return [builder.bitcast(spot, row.as_pointer()) for spot in spots]

        lines = [builder.load(spot, align=2) for spot in rows(start, arguments[2])]
        for half in (8, 4, 2, 1):  # swap the two blocks beside the diagonal, then within each
            upper = ir.Constant(row, [n + 16 - half if n & half else n for n in range(16)])
            lower = ir.Constant(row, [n + 16 if n & half else n + half for n in range(16)])
            for line in range(16):
                if not line & half:
                    pair = lines[line], lines[line | half]
                    lines[line] = builder.shuffle_vector(*pair, upper)
                    lines[line | half] = builder.shuffle_vector(*pair, lower)
        for line, spot in zip(lines, rows(end, arguments[5]), strict=True):
            builder.store(line, spot, align=2)
        return context.get_dummy_value()

    long = types.int64
    return types.none(source, long, long, out, long, long), generate


def _settings(name: str) -> Any:
    def typed(_typing: Any, given: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = _pointer(context, builder, signature.args[0], arguments[0], _LONG(0))
            _call(builder, name, place)
            return context.get_dummy_value()

        return types.none(given), generate

    return intrinsic(typed)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Where number `index` of a contiguous array lies."""
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    data = context.make_array(kind)(context, builder, array).data
    start = builder.bitcast(data, _BYTE.as_pointer())
    return builder.gep(start, [builder.mul(index, _LONG(size))])


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    known = builder.module.globals.get(f"llvm.x86.{name}")
    builder.call(known or ir.Function(builder.module, kind, f"llvm.x86.{name}"), arguments)


multiply: Any = intrinsic(_multiply)
"""multiply(a, at, spots, many, row, steps, b, at, out, at, more): the product of a and b.

Of `a` 32 rows, `row` bytes apart, begin at each of the first `many` of int64 `spots`, counted from
`at`, and have 32 `steps` numbers there; all of these side by side times b [.., 32] of pairs, in
float32 [32, 32]. `more` adds to what is there.
"""
turn: Any = intrinsic(_turn)
"""turn(source, at, row, out, at, row): 16 x 16 words of 32 bits transposed; rows are so many bytes
apart."""
configure: Any = _settings("ldtilecfg")
"""Set up the tiles as uint8 [64] says."""
configured: Any = _settings("sttilecfg")
"""Write to uint8 [64] how they are set up: others reckon with what they set up themselves."""
