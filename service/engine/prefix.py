"""The prefix cache: the pages of a prompt that were computed before, by all that decides them.

A page's key is a digest over the key of the page before it, its tokens, and how these attended.
Keys and values follow from that and nothing else: what fell back has another key than what did
not, requests that prefill alike find each other's pages, and whatever else they ask for is of no
matter. A chain of digests over whole pages is that of vLLM's cache (Kwon et al. 2023, "Efficient
Memory Management for Large Language Model Serving with PagedAttention"); what its link says of
attention is what a service needs whose prompts do not all attend alike.

The last tokens of a prompt attend under the request's policy and are judged as one: pages that
reach into them are neither kept nor looked for. Where a kernel failed, or a key is not finite,
neither that page nor any behind it is kept.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

from kernels.page import PAGE
from service.engine.pages import Content
from service.engine.sequence import Fallback, Mode, Sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.engine.pages import PagePool

DIGEST = 32
"""Bytes of a key: nobody finds two prompts of one key."""


class PrefixCache:
    """Finds and keeps pages of prompts in a pool."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def look(self, sequence: Sequence) -> None:
        """Note how many first pages a waiting sequence would find, by a look at the last of them.

        Pages that go do so from the end of a chain, as a rule: a step asks for one or two.
        """
        most, found = _most(sequence), sequence.found
        while found > 0 and self._pool.find(_key(sequence, found - 1)) is None:
            found -= 1
        while found < most and self._pool.find(_key(sequence, found)) is not None:
            found += 1
        sequence.found = found

    def find(self, sequence: Sequence) -> list[int]:
        """The physical pages that a sequence which has computed nothing can begin with.

        Those behind the ones that it has.
        """
        found: list[int] = []
        for number in range(len(sequence.pages), _most(sequence)):
            page = self._pool.find(_key(sequence, number))
            if page is None:
                break
            found.append(page)
        return found

    def begin(self, sequence: Sequence, pages: list[int]) -> None:
        """Let a sequence begin with the pages that were found for it, behind those that it has."""
        self._pool.share(pages)
        del sequence.reused[len(sequence.pages) :]
        sequence.reused += [self._pool.content(page) for page in pages]
        sequence.pages += pages
        sequence.found = len(sequence.pages)
        sequence.computed = sequence.found * PAGE
        # What a page that is yet to be computed falls back to is not known: its key may change.
        del sequence.keys[sequence.found :]
        request = sequence.request
        if sequence.started is None and request.sampling.prompt_logprobs is None:
            request.cached = sequence.computed

    def coming(self, sequence: Sequence) -> bytes | None:
        """The key of the page that a running sequence computes next, if nothing falls back.

        None: it is none that others may find.
        """
        number = len(sequence.keys)
        # One that has computed more than it kept keeps no more.
        if number < sequence.computed // PAGE or number >= sequence.request.tail_start // PAGE:
            return None
        _key(sequence, number)
        return sequence.keys.pop()

    def may_find(self, sequence: Sequence) -> bool:
        """Whether a running sequence could take its next page over: it has computed nothing yet."""
        return sequence.computed == sequence.found * PAGE and sequence.found < _most(sequence)

    def fresh(self, sequence: Sequence) -> range:
        """Numbers of the pages that a running sequence has computed and that may be kept."""
        known = len(sequence.keys)
        stop = min(sequence.computed, sequence.request.tail_start) // PAGE
        if sequence.sealed:
            return range(known, known)
        failed = (
            number
            for number in range(known, stop)
            if sequence.fallback(number * PAGE) is Fallback.KERNEL_ERROR
        )
        return range(known, next(failed, stop))

    def keep(self, sequence: Sequence, looks: Iterable[tuple[float, float]]) -> None:
        """Keep the next pages of a sequence, whose keys and values are finite.

        Args:
            sequence: whose.
            looks: of each page, the density and the coverage of its tokens.
        """
        for density, coverage in looks:
            number = len(sequence.keys)
            content = Content(_key(sequence, number), density, coverage)
            self._pool.keep(sequence.pages[number], content)


def _most(sequence: Sequence) -> int:
    """How many pages a sequence may take over."""
    request = sequence.request
    # The log-probabilities of a prompt's tokens come from hidden states, which nobody keeps.
    return 0 if request.sampling.prompt_logprobs is not None else request.tail_start // PAGE


def _key(sequence: Sequence, number: int) -> bytes:
    """The key of a sequence's page, by how its tokens attend; the sequence remembers it."""
    keys, request = sequence.keys, sequence.request
    while len(keys) <= number:
        before = keys[-1] if keys else _root(request.cache_salt)
        start = len(keys) * PAGE
        link = blake2b(before, digest_size=DIGEST)
        link.update(array("q", request.prompt[start : start + PAGE]).tobytes())
        link.update(_way(sequence, start).encode())
        keys.append(link.digest())
    return keys[number]


def _root(salt: str) -> bytes:
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def _way(sequence: Sequence, start: int) -> str:
    """How the tokens of the page that begins at `start` attend, before the prompt's tail.

    With `min_coverage`, though it changes no key: what stays under it must not be found.
    """
    wanted, mode = sequence.request.sparsity, sequence.mode(start)
    if mode is Mode.DYNAMIC:
        return f"dynamic {wanted.prefill_coverage!r} {wanted.min_coverage!r} {wanted.dense_layers}"
    if mode is Mode.FIXED:
        return f"fixed {wanted.dense_layers} {wanted.pattern}"
    return "dense"
