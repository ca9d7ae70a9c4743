"""How numba's kernels are compiled and run: in as many threads as torch has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import numba
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Function = TypeVar("Function", bound="Callable[..., Any]")

# Sums may be reordered, so that they run in vectors; nan and inf stay what they are.
_FLAGS = {"contract", "reassoc", "nsz"}
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


@lru_cache
def sources() -> int:
    """A number that changes with any of the kernels.

    numba keeps compiled kernels beside their file (or in NUMBA_CACHE_DIR, or the user's own cache,
    whichever can be written). It knows when that file changes, and not when what is called from
    there does: a kernel that closes over this number is compiled anew.
    """
    here = Path(__file__).parent
    names = ("budget.py", "codes.py", "page.py", "sample.py", "tiles.py")
    others = [here.with_name(name) for name in names]
    files = sorted([*here.glob("*.py"), *others])
    return crc32(b"".join(file.read_bytes() for file in files))


def entry(function: Function) -> Function:
    """Compiled for this processor, to be called from Python; kept on disk where there is room."""
    try:
        compiled: Function = numba.njit(fastmath=_FLAGS, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba finds nowhere to write
        compiled = numba.njit(fastmath=_FLAGS, **_OPTIONS)(function)
    return compiled


def jit(function: Function) -> Function:
    """Compiled to be called from other kernels."""
    options = {**_OPTIONS, "no_cpython_wrapper": True}
    compiled: Function = numba.njit(fastmath=_FLAGS, **options)(function)
    return compiled


def inlined(function: Function) -> Function:
    """Compiled into its callers: a call counts the references to its arrays, which takes time."""
    options = {**_OPTIONS, "no_cpython_wrapper": True, "forceinline": True}
    compiled: Function = numba.njit(fastmath=_FLAGS, **options)(function)
    return compiled


def exact(function: Function) -> Function:
    """Compiled into its callers, every operation in the order in which it is written."""
    options = {**_OPTIONS, "no_cpython_wrapper": True, "forceinline": True}
    compiled: Function = numba.njit(fastmath={"contract"}, **options)(function)
    return compiled


def in_threads(
    work: Callable[..., None], arguments: tuple[Any, ...], units: int, least: int = 1
) -> None:
    """Run `work(*arguments, part, start, stop)` on parts of `units`, a thread each.

    The calling thread takes the first part: a step of one thread wakes no other, nor do fewer
    units than `least`.
    """
    parts = min(torch.get_num_threads() if units >= least else 1, units)
    if parts == 0:
        return
    edges = [units * part // parts for part in range(parts + 1)]
    waiting = [
        _pool(parts - 1).submit(work, *arguments, part, start, stop)
        for part, (start, stop) in enumerate(pairwise(edges))
        if part > 0
    ]
    try:
        work(*arguments, 0, 0, edges[1])
    finally:
        for one in waiting:
            one.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saccade-kernel")
