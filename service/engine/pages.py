"""The pool of physical KV pages: shared by reference count, kept by content; pure Python."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """What a complete page holds.

    Attributes:
        key: digest of all that decides its keys and values (`service.engine.prefix`).
        density: keys over keys visible that its tokens read when it was computed.
        coverage: attention mass on them; nan: unknown.
    """

    key: bytes
    density: float
    coverage: float


class PagePool:
    """Hands out pages, lowest number first, so that a sequence's pages tend to be neighbours.

    A page that nobody holds is free, also one whose content is known: that stays findable until the
    page is needed, when all others are taken. The least recently used goes first.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._blank = list(range(pages))  # a heap: free, of no known content
        self._kept: OrderedDict[int, None] = OrderedDict()  # free otherwise, first to go first
        self._users = [0] * pages  # sequences that hold each page
        self._contents: list[Content | None] = [None] * pages
        self._by_key: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._kept)

    @property
    def usage(self) -> float:
        """Share of the pages that somebody holds, 0 to 1."""
        return 1 - self.free / self.pages

    def take(self, count: int) -> list[int]:
        """`count` pages; the caller has checked that so many are free."""
        assert count <= self.free
        taken = [heapq.heappop(self._blank) for _ in range(min(count, len(self._blank)))]
        while len(taken) < count:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
            taken.append(page)
        for page in taken:
            self._users[page] = 1
        return sorted(taken)

    def share(self, pages: list[int]) -> None:
        """One more sequence holds `pages`, which somebody holds or whose contents are known."""
        for page in pages:
            if self._users[page] == 0:
                del self._kept[page]
            self._users[page] += 1

    def release(self, pages: list[int]) -> None:
        """A sequence lets go of `pages`; those that nobody else holds are free."""
        # A page is of use behind those before it alone: the last ones are the first to go.
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0
            if self._users[page] > 0:
                continue
            if self._contents[page] is None:
                heapq.heappush(self._blank, page)
            else:
                self._kept[page] = None

    def keep(self, page: int, content: Content) -> None:
        """Make a held page findable, in the place of any other of the same content."""
        assert self._users[page] > 0
        other = self._by_key.get(content.key)
        if other == page:
            return
        if other is not None:
            self._forget(other)
            if self._users[other] == 0:
                del self._kept[other]
                heapq.heappush(self._blank, other)
        self._by_key[content.key] = page
        self._contents[page] = content

    def find(self, key: bytes) -> int | None:
        """The page of that content; None: there is none."""
        return self._by_key.get(key)

    def content(self, page: int) -> Content:
        """What is known of a page that was found."""
        content = self._contents[page]
        assert content is not None
        return content

    def idle(self, pages: list[int]) -> int:
        """How many of `pages` nobody holds."""
        return sum(self._users[page] == 0 for page in pages)

    def _forget(self, page: int) -> None:
        del self._by_key[self.content(page).key]
        self._contents[page] = None
