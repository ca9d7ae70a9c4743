"""Kernels that begin while the one before them ends: programmatic dependent launch, from Hopper on.

A kernel launched so has its programs on the device, and its weights on their way, when its input is
complete; a step's many short kernels otherwise spend a good part of their time in beginning.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.lanes import INTERPRETED, inlined


def possible(device: torch.device) -> bool:
    """Whether kernels on this device can overlap: what their `launch_pdl` and OVERLAP say."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Let the next kernel be launched; to be called first of all."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for all kernels before this one: nothing they write may be read, nothing be written,
    before this has been called, or what takes its place. Every kernel that is launched so must call
    it, since the next one waits for this one alone.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@inlined
def publish(pointer, number):
    """Write a number that is not negative, and let it be seen by who finds it in `published` that
    this program has written all that it will.
    """
    if INTERPRETED:  # it has no masks for atomics
        tl.store(pointer, number)
    else:
        tl.debug_barrier()
        tl.atomic_xchg(pointer, number, sem="release")


@inlined
def published(pointer):
    """Wait for a program of the kernel before this one, all of whose programs have begun: for a
    number in place of one that is negative, int32.

    What had to be waited for by that program, this one may read, too.
    """
    if INTERPRETED:
        number = tl.load(pointer)
    else:
        number = tl.inline_asm_elementwise(
            "{ .reg .pred p; again: ld.acquire.gpu.global.b32 $0, [$1]; setp.lt.s32 p, $0, 0;"
            " @p nanosleep.u32 64; @p bra again; }",
            "=r,l", [pointer.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return number


@triton.jit
def prefetch(pointers, OVERLAP: tl.constexpr):
    """Bring the 128 bytes around each pointer into the L2 cache."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_lines(pointers, NUMBERS: tl.constexpr, OVERLAP: tl.constexpr):
    """Likewise all of the `NUMBERS` numbers from each of `pointers` [n] on."""
    size: tl.constexpr = pointers.dtype.element_ty.primitive_bitwidth // 8
    pieces: tl.constexpr = (NUMBERS * size + 127) // 128
    piece = tl.arange(0, triton.next_power_of_2(pieces)) % pieces * (128 // size)
    prefetch(pointers[:, None] + piece[None], OVERLAP)
