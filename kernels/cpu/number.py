"""Numbers and their bits, in numba's kernels."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import for_range_slice
from numba.extending import intrinsic

from kernels.cpu.launch import exact

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_LOG2E = np.float32(1 / math.log(2))
_SHIFT, _ONE = np.float32(1.5 * 2**23), np.float32(1)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)
# 2 ** x - 1 over x on -0.5 to 0.5, from the highest power on (Cephes' exp2f): to 2e-7.
_P0, _P1, _P2 = np.float32(1.535336188e-4), np.float32(1.339887440e-3), np.float32(9.618437357e-3)
_P3, _P4, _P5 = np.float32(5.550332471e-2), np.float32(2.402264791e-1), np.float32(6.931472028e-1)
# 2 ** x over x on -0.5 to 0.5, from the highest power on: to 1e-4.
_C0, _C1 = np.float32(0.05517166), np.float32(0.24261112)
_C2, _C3 = np.float32(0.69326099), np.float32(0.99992807)


def _popcount(_typing: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = builder.module.declare_intrinsic("llvm.ctpop", [ir.IntType(64)])
        return builder.call(count, arguments)

    return types.int64(types.int64), generate


def _number(_typing: Any, stored: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if stored == types.float32:
            return arguments[0]
        word = builder.zext(arguments[0], _WORD)
        if stored == types.uint8:
            return _of_byte(builder, word)
        return builder.bitcast(builder.shl(word, _WORD(16)), _FLOAT)

    return types.float32(stored), generate


def _of_byte(builder: Any, byte: Any) -> Any:
    """A number of 8 bits (`kernels.codes.FLOAT8`)."""
    size = builder.and_(byte, _WORD(127))
    # A float32's exponent is greater by 120. Of the least exponent there is no leading bit: for it
    # the number is built with one, which is then taken away; processors are slow with subnormals.
    least = builder.icmp_unsigned("<", size, _WORD(8))
    word = builder.add(builder.shl(size, _WORD(20)), _WORD(120 << 23))
    word = builder.select(least, builder.add(word, _WORD(1 << 23)), word)
    value = builder.bitcast(word, _FLOAT)
    value = builder.select(least, builder.fsub(value, _FLOAT(2.0**-6)), value)
    nan = builder.icmp_unsigned("==", size, _WORD(127))
    word = builder.select(nan, _WORD(0x7FC00000), builder.bitcast(value, _WORD))
    sign = builder.and_(builder.shl(byte, _WORD(24)), _WORD(-(2**31)))
    return builder.bitcast(builder.or_(word, sign), _FLOAT)


def _stored(_typing: Any, _number: Any, like: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if like.dtype == types.float32:
            return arguments[0]
        word = builder.bitcast(arguments[0], _WORD)
        odd = builder.and_(builder.lshr(word, _WORD(16)), _WORD(1))
        even = builder.add(word, builder.add(odd, _WORD(0x7FFF)))  # to the nearest, ties to even
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        word = builder.select(nan, _WORD(0x7FC00000), even)
        return builder.trunc(builder.lshr(word, _WORD(16)), ir.IntType(16))

    return like.dtype(types.float32, like), generate


def _bits(_typing: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _WORD)

    return types.int32(types.float32), generate


def _order(_typing: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _flipped(builder, builder.bitcast(arguments[0], _WORD))

    return types.int32(types.float32), generate


def _of_order(_typing: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(_flipped(builder, arguments[0]), _FLOAT)

    return types.float32(types.int32), generate


def _number_of_bits(_typing: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


def _prefetch_row(_typing: Any, rows: Any, _row: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        step = builder.mul(arguments[1], builder.extract_value(array.strides, 0))
        width = builder.mul(builder.extract_value(array.shape, 1), array.itemsize)
        byte = ir.IntType(8).as_pointer()
        start = builder.gep(builder.bitcast(array.data, byte), [step])
        kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        fetch = builder.module.globals.get("llvm.prefetch.p0")
        if fetch is None:
            fetch = ir.Function(builder.module, kind, "llvm.prefetch.p0")
        with for_range_slice(builder, width.type(0), width, width.type(64)) as (offset, _):
            builder.call(fetch, [builder.gep(start, [offset]), _WORD(0), _WORD(3), _WORD(1)])
        return context.get_dummy_value()

    return types.none(rows, types.int64), generate


def _add_columns(_typing: Any, table: Any, columns: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = ir.VectorType(_WORD, 8).as_pointer()
        rows, total = (
            builder.bitcast(context.make_array(kind)(context, builder, one).data, row)
            for kind, one in zip(signature.args, arguments, strict=True)
        )
        parts = [builder.load(builder.gep(rows, [_WORD(n)]), align=4) for n in range(8)]
        builder.store(reduce(builder.add, parts), total, align=4)
        return context.get_dummy_value()

    return types.none(table, columns), generate


def _join_words(_typing: Any, source: Any, _word: Any, target: Any, _place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = ir.VectorType(_WORD, 4).as_pointer()
        words, keys = (
            builder.bitcast(
                context.make_array(signature.args[n])(context, builder, arguments[n]).data, row
            )
            for n in (0, 2)
        )
        first = builder.shl(arguments[1], arguments[1].type(1))
        low, high = (
            builder.load(builder.gep(words, [builder.add(first, first.type(n))]), align=4)
            for n in (0, 1)
        )
        target = builder.shl(arguments[3], arguments[3].type(1))
        for half in (0, 1):
            order = ir.Constant(
                ir.VectorType(_WORD, 4), [2 * half, 4 + 2 * half, 2 * half + 1, 5 + 2 * half]
            )
            place = builder.gep(keys, [builder.add(target, target.type(half))])
            builder.store(builder.shuffle_vector(low, high, order), place, align=4)
        return context.get_dummy_value()

    return types.none(source, types.int64, target, types.int64), generate


def _long_vectors(_typing: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        # llvmlite's own method takes no attribute that it does not know.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


def _flipped(builder: Any, word: Any) -> Any:
    """A negative number's bits but for its sign."""
    mask = builder.lshr(builder.ashr(word, _WORD(31)), _WORD(1))
    return builder.xor(word, mask)


def _times_power(_typing: Any, _number: Any, _power: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        power = builder.shl(builder.bitcast(arguments[1], _WORD), _WORD(23))
        return builder.bitcast(builder.add(builder.bitcast(arguments[0], _WORD), power), _FLOAT)

    return types.float32(types.float32, types.float32), generate


popcount: Any = intrinsic(_popcount)
"""How many bits of an int64 are set: LLVM's own, which numba does not offer."""
number: Any = intrinsic(_number)
"""The float32 of a stored number: itself, or of a bfloat16 as uint16 or a float8 as uint8."""
stored: Any = intrinsic(_stored)
"""A float32 as an array stores it: itself, or rounded to a bfloat16 given as uint16."""
bits: Any = intrinsic(_bits)
"""A float32's bits, int32."""
number_of_bits: Any = intrinsic(_number_of_bits)
"""The float32 of its bits."""
order: Any = intrinsic(_order)
"""An int32 that orders as the float32 does, a positive nan above all: vectors have its maximum."""
of_order: Any = intrinsic(_of_order)
"""The float32 of an `order`."""
prefetch_row: Any = intrinsic(_prefetch_row)
"""Start to read a row of a two-dimensional array: what is read in no order is not foreseen."""
add_columns: Any = intrinsic(_add_columns)
"""The sums of an 8 x 8 table's columns, int32 [64] to [8]: LLVM takes the numbers one by one."""
join_words: Any = intrinsic(_join_words)
"""Of four keys, uint32 [words, 4], words 2 n and 2 n + 1 as one: to int64 [64], by fours."""
long_vectors: Any = intrinsic(_long_vectors)
"""The calling function runs in vectors of 512 bits: LLVM takes half on Intel's processors."""
_scaled: Any = intrinsic(_times_power)
"""A number times two to a whole power, which stands in the last bits of a second."""


@exact
def small_power(power: Any) -> Any:
    """2 ** power, float32, of a power of at most 0: to 1e-4 of it, and not under 2 ** -126.

    For weights that are then rounded to bfloat16, to 4e-3 of them.
    """
    inside = _LOWEST if power < _LOWEST else power  # a nan stays
    shifted = inside + _SHIFT
    part = inside - (shifted - _SHIFT)
    value = _C0
    value = value * part + _C1
    value = value * part + _C2
    return _scaled(value * part + _C3, shifted)


@exact
def exp(x: Any) -> Any:
    """e ** x, float32, by operations that vectors have: 0 below 1e-38, finite above."""
    power = x * _LOG2E
    inside = power if power < _HIGHEST else _HIGHEST
    shifted = inside + _SHIFT  # rounds: the last bits are whole
    part = inside - (shifted - _SHIFT)
    value = _P0
    value = value * part + _P1
    value = value * part + _P2
    value = value * part + _P3
    value = value * part + _P4
    value = value * part + _P5
    value = _scaled(value * part + _ONE, shifted)
    value = value if power > _LOWEST else np.float32(0)
    return value if x == x else x
