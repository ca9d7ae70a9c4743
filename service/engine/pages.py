"""The pool of physical KV pages, shared by reference count; pure Python."""

from __future__ import annotations

import heapq


class PagePool:
    """Hands out pages, lowest number first, so that a sequence's pages tend to be neighbours."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))  # a heap
        self._users = [0] * pages  # sequences that hold each page

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return 1 - self.free / self.pages

    def take(self, count: int) -> list[int]:
        """`count` pages; the caller has checked that so many are free."""
        assert count <= self.free
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One more sequence holds `pages`."""
        for page in pages:
            assert self._users[page] > 0
            self._users[page] += 1

    def release(self, pages: list[int]) -> None:
        """A sequence lets go of `pages`; those that nobody else holds are free."""
        for page in pages:
            self._users[page] -= 1
            assert self._users[page] >= 0
            if self._users[page] == 0:
                heapq.heappush(self._free, page)
