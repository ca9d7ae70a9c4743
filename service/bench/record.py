"""What `saccade bench decode` measures, and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Record:
    """Medians of one way at one cell."""

    batch: int
    context: int
    policy: str  # dynamic, dense (both over the paged cache), or a peer's name
    keys: float  # read of each row and KV head
    us: float  # microseconds a step
    bytes: int  # that it reads at least
    dense_us: float  # of the fastest peer
    dense_peer: str
    ratio: float  # the peer over this, median of the paired ratios
    limit_share: float | None  # time that reading the bytes takes, over `us`


def table(records: Sequence[Record]) -> str:
    """The records as text."""
    lines = [
        f"{'batch':>5} {'context':>8} {'policy':<11} {'keys':>8} {'time':>11} {'MB read':>8} "
        f"{'of limit':>8} {'peer / this':>11}"
    ]
    for r in records:
        share = "" if r.limit_share is None else f"{r.limit_share:.0%}"
        lines.append(
            f"{r.batch:>5} {r.context:>8} {r.policy:<11} {r.keys:>8.0f} {r.us:>8.1f} us "
            f"{r.bytes / 1e6:>8.1f} {share:>8} {r.ratio:>11.2f}"
        )
    return "\n".join(lines)
