"""The page: the unit in which KV memory is handed out and coded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import Rows

PAGE_BITS = 6
PAGE = 1 << PAGE_BITS
"""Keys a page holds."""


def recent_page(rows: Rows) -> Tensor:
    """int64 [rows], the page with which each row's always-kept window begins."""
    return (rows.lengths // PAGE - 1).clamp_min(0)
