"""Fixed patterns: which keys a query sees by position alone.

Each primitive has one definition, `allows(query, key)`; `keys(positions)` lists the same keys
without forming a mask. All are causal: a query never sees a later key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.errors import PatternError
from kernels.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sinks:
    """The first `size` keys (Xiao et al. 2023, attention sinks)."""

    size: int
    name: ClassVar[str] = "sinks"

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over positions: may `query` see `key`."""
        return (key <= query) & (key < self.size)

    def keys(self, positions: Tensor, most: int) -> Tensor:
        """int64 [rows, n], what each query sees; entries outside 0 to its position do not count."""
        key = torch.arange(min(self.size, most + 1), device=positions.device)
        return key.expand(len(positions), -1)


@dataclass(frozen=True, slots=True)
class Window:
    """The last `size` keys, the query's own included."""

    size: int
    name: ClassVar[str] = "window"

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over positions: may `query` see `key`."""
        return (key <= query) & (query - key < self.size)

    def keys(self, positions: Tensor, most: int) -> Tensor:
        """int64 [rows, n], what each query sees; entries outside 0 to its position do not count."""
        back = torch.arange(min(self.size, most + 1), device=positions.device)
        return positions[:, None] - back


@dataclass(frozen=True, slots=True)
class Strided:
    """Every `size`-th key back from the query, its own included (Child et al. 2019).

    The paper's local part is a `window` of its own: `"window:128+strided:128"`.
    """

    size: int
    name: ClassVar[str] = "strided"

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over positions: may `query` see `key`."""
        return (key <= query) & ((query - key) % self.size == 0)

    def keys(self, positions: Tensor, most: int) -> Tensor:
        """int64 [rows, n], what each query sees; entries outside 0 to its position do not count."""
        back = torch.arange(0, most + 1, self.size, device=positions.device)
        return positions[:, None] - back


Primitive = Sinks | Window | Strided
_PRIMITIVES: dict[str, type[Primitive]] = {kind.name: kind for kind in (Sinks, Window, Strided)}


@dataclass(frozen=True, slots=True)
class Pattern:
    """A union of primitives, written `"sinks:16+window:1024"`."""

    parts: tuple[Primitive, ...]

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern.

        Raises:
            PatternError: naming the part that is wrong and the form it should have.
        """
        return Pattern(tuple(_parse_part(part.strip(), text) for part in text.split("+")))

    def __str__(self) -> str:
        return "+".join(f"{part.name}:{part.size}" for part in self.parts)

    @property
    def keeps_previous(self) -> bool:
        """Whether every query sees the key before it, without which induction heads break."""
        one, two = torch.tensor(10**9), torch.tensor(10**9 - 1)
        return bool(self.allows(one, two))

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over positions: may `query` see `key`."""
        allowed = self.parts[0].allows(query, key)
        for part in self.parts[1:]:
            allowed = allowed | part.allows(query, key)
        return allowed

    def select(self, lengths: Tensor, starts: Tensor, kv_heads: int) -> Selection:
        """The selection of decode rows; all KV heads share it.

        Args:
            lengths: int64 [rows], end of the visible keys; the query is the key before it.
            starts: int64 [rows], first visible key.
            kv_heads: number of KV heads.
        """
        positions = lengths - 1
        most = int(positions.max())
        keys = torch.cat([part.keys(positions, most) for part in self.parts], dim=1)
        seen = (keys >= starts[:, None]) & (keys <= positions[:, None])  # [rows, listed]
        keys = keys.masked_fill(~seen, most + 1).sort(dim=1).values
        seen = keys <= most
        seen[:, 1:] &= keys[:, 1:] != keys[:, :-1]  # what two primitives see counts once
        one = Selection.from_mask(seen[:, None], keys[:, None])
        return Selection(one.indices.expand(-1, kv_heads, -1), one.counts.expand(-1, kv_heads))


def _parse_part(part: str, whole: str) -> Primitive:
    name, _, size = part.partition(":")
    kind = _PRIMITIVES.get(name)
    if kind is None or not size.isascii() or not size.isdigit() or not 0 < int(size) < 2**31:
        known = ", ".join(f"{known}:N" for known in _PRIMITIVES)
        raise PatternError(
            f"cannot read {part[:40]!r} in the pattern {whole[:80]!r}: write a union of {known} "
            "with N from 1, such as sinks:16+window:1024"
        )
    return kind(int(size))
