"""Numbers of 8 bits (`kernels.codes.FLOAT8`), which older GPUs have no instructions for."""

from __future__ import annotations

import torch
import triton.language as tl

from kernels.gpu.lanes import INTERPRETED, inlined, pack

NAN, SIGN = tl.constexpr(127), tl.constexpr(128)
HIGHER = tl.constexpr(2.0**120)
"""What a float32's exponent is greater by."""


def known(device: torch.device) -> bool:
    """Whether a GPU has instructions for them; in the interpreter true."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@inlined
def of_byte(byte):
    """float32 of a byte, uint8 or a wider one whose other bits do not matter."""
    byte = byte.to(tl.int32)
    size = ((byte & NAN) << 20).to(tl.float32, bitcast=True) * HIGHER
    size = tl.where(byte & NAN == NAN, float("nan"), size)
    return tl.where(byte & SIGN != 0, -size, size)


@inlined
def to_byte(number, MOST: tl.constexpr):
    """uint8 of float32: the nearest, of two the even one; none is greater than `MOST`."""
    size = tl.minimum(tl.abs(number), MOST) * (1 / HIGHER)
    bits = size.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << 19) - 1) + (bits >> 20 & 1)) >> 20
    byte = tl.where(number != number, NAN, bits) | tl.where(number < 0, SIGN, 0)
    return byte.to(tl.uint8)


@inlined
def as_halves(word):
    """An int32's [lanes] four numbers as float16: two int32 [lanes] of two each."""
    if INTERPRETED:
        four = tuple(of_byte(word >> 8 * place) for place in range(4))
        words = (pack(four[0], four[1], False), pack(four[2], four[3], False))
    else:
        words = tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }",
            "=&r,=r,r",
            [word],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return words


@inlined
def of_word(word, KNOWN: tl.constexpr):
    """An int32's [lanes] four numbers: float32 [lanes] each."""
    if KNOWN and not INTERPRETED:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b16 l, h, a, b; .reg .b32 t; mov.b32 {l, h}, $4;"
            " cvt.rn.f16x2.e4m3x2 t, l; mov.b32 {a, b}, t; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;"
            " cvt.rn.f16x2.e4m3x2 t, h; mov.b32 {a, b}, t; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }",
            "=&f,=&f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        numbers = (of_byte(word), of_byte(word >> 8), of_byte(word >> 16), of_byte(word >> 24))
    return numbers
