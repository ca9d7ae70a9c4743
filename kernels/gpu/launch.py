"""How much of a kernel's work one program takes.

No kernel is compiled anew for a length that happens to be 1 or a multiple of 16: what differs from
step to step is named in its `do_not_specialize`. Sizes that are compiled in are powers of two.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

MULTIPROCESSORS = 132
"""Of an H200, for which work is cut into programs."""
PROGRAMS = 1024
"""Programs that fill a GPU: some eight for each multiprocessor."""
SHARED = 20
"""Per cent of a multiprocessor's memory that are shared memory while kernels of `mostly_cache` run;
the rest is cache. All have to ask for the same: what differs does not begin until others end.
"""
_PREFERRED = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT."""


def splits_for(programs: int, pieces: int) -> int:
    """Into how many programs to split work of `pieces` pieces that `programs` others do besides."""
    wanted = max(1, min(pieces, -(-PROGRAMS // max(1, programs))))
    return -(-pieces // -(-pieces // wanted))  # as few as take the same number of pieces each


def tile_of(group: int) -> int:
    """Query heads of a program: a power of two, 16 at least, for a tensor core's product."""
    return max(16, int(triton.next_power_of_2(group)))


def mostly_cache(kernel: CompiledKernel | None) -> None:
    """Have a kernel's next launches find most of a multiprocessor's memory to be cache.

    A kernel that begins beside a product of weights otherwise finds nearly all of it to be shared
    memory; and to read many keys at once takes as many lines of cache.

    Args:
        kernel: what the launch returned: None from Triton's interpreter.
    """
    if kernel is not None:
        _prefer(kernel.function)


@cache
def _prefer(function: int) -> None:
    """Once for each function: a wish, of which an error is of no consequence."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED, SHARED)
