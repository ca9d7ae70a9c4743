"""The page: the unit in which KV memory is handed out and summarised."""

from __future__ import annotations

PAGE = 64
"""Keys a page holds."""
