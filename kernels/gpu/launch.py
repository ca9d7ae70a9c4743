"""How much of a kernel's work one program takes.

No kernel is compiled anew for a length that happens to be 1 or a multiple of 16: what differs from
step to step is named in its `do_not_specialize`. Sizes that are compiled in are powers of two.
"""

from __future__ import annotations

import triton

PROGRAMS = 1024
"""Programs that fill a GPU: some eight for each of an H200's 132 multiprocessors."""


def splits_for(programs: int, pieces: int) -> int:
    """Into how many programs to split work of `pieces` pieces that `programs` others do besides."""
    wanted = max(1, min(pieces, -(-PROGRAMS // max(1, programs))))
    return -(-pieces // -(-pieces // wanted))  # as few as take the same number of pieces each


def tile_of(group: int) -> int:
    """Query heads of a program: a power of two, 16 at least, for a tensor core's product."""
    return max(16, int(triton.next_power_of_2(group)))
