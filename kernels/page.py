"""The page: the unit in which KV memory is handed out and coded."""

from __future__ import annotations

PAGE_BITS = 6
PAGE = 1 << PAGE_BITS
"""Keys a page holds."""
