"""One layer's paged KV cache, the codes of its keys, and what stands for a whole page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from kernels.codes import FLOAT8, FOURS, encode, stored_centre, stored_scale, words
from kernels.page import PAGE, PAGE_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kernels.patterns.pattern import Pattern
    from kernels.tiles import TileSelection


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer in 64-key pages, shared by all sequences.

    A key and its value lie side by side, so the gather of one selected key is one read. Heads come
    first: physically neighbouring pages of one head are then one evenly strided run of keys, which
    dense attention reads in place.
    """

    kv: Tensor  # [kv_heads, pages, 64, 2, head_dim]  key at 0, value at 1
    key_mean: Tensor  # [kv_heads, pages, head_dim]  of each page
    centre: Tensor  # float8 [kv_heads, pages, head_dim]  what is taken away before keys are coded
    codes: Tensor  # int32 [kv_heads, pages, 16, words, 4]  signs of the keys' rotated rest
    scale: Tensor  # float8 [kv_heads, pages, 16, 4]  of the keys' codes
    value_mean: Tensor  # [kv_heads, pages, head_dim]  of each page
    spread: Tensor  # float32 [kv_heads, pages]  variance of a page's keys, mean over channels
    # [heads], float32 or wider: what each position is worth in each query head (`kernels.alibi`)
    slopes: Tensor | None = None

    @staticmethod
    def allocate(
        pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> LayerCache:
        """An empty cache of `pages` pages; zeroed, so that unwritten keys are finite."""
        return LayerCache(
            kv=torch.zeros(kv_heads, pages, PAGE, 2, head_dim, dtype=dtype, device=device),
            key_mean=torch.zeros(kv_heads, pages, head_dim, dtype=dtype, device=device),
            centre=torch.zeros(kv_heads, pages, head_dim, dtype=FLOAT8, device=device),
            codes=torch.zeros(
                kv_heads, pages, FOURS, words(head_dim), 4, dtype=torch.int32, device=device
            ),
            scale=torch.zeros(kv_heads, pages, FOURS, 4, dtype=FLOAT8, device=device),
            value_mean=torch.zeros(kv_heads, pages, head_dim, dtype=dtype, device=device),
            spread=torch.zeros(kv_heads, pages, device=device),
        )

    @staticmethod
    def bytes_per_page(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes in one layer, its codes and means included."""
        numbers = 2 * (PAGE + 1) * head_dim  # keys and values, and their means
        coded = head_dim + PAGE * (4 * words(head_dim) + 1)
        return kv_heads * (numbers * dtype.itemsize + coded + 4)

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.kv.shape[0]

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.kv.shape[-1]

    def biased(self, slopes: Tensor | None) -> LayerCache:
        """The same cache, whose keys' places count; None gives it as it is."""
        return self if slopes is None else replace(self, slopes=slopes)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors of pages, [kv_heads, pages, ...] each, in the order of the fields."""
        coded = (self.centre, self.codes, self.scale)
        return (self.kv, self.key_mean, *coded, self.value_mean, self.spread)

    @staticmethod
    def of_pages(part: Tensor, tables: Tensor) -> Tensor:
        """What `part` [kv_heads, pages, ...] holds of physical pages `tables` [sequences, pages].

        Returns:
            [kv_heads * sequences, pages, ...], in place where one sequence's pages are neighbours.
        """
        start = neighbours(tables[0]) if len(tables) == 1 else None
        if start is None:
            return part[:, tables].flatten(0, 1)
        return part[:, start : start + tables.shape[1]]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new keys and values.

        Args:
            slots: int64 [tokens], physical page * 64 + offset, each at most once.
            keys: [tokens, kv_heads, head_dim].
            values: [tokens, kv_heads, head_dim].
        """
        rows = self.kv.view(self.kv_heads, -1, 2, self.head_dim)
        rows[:, slots] = torch.stack((keys, values), dim=2).transpose(0, 1).to(rows.dtype)

    def write_run(self, page: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of a whole sequence in neighbouring pages.

        Args:
            page: the first physical page.
            keys: [tokens, kv_heads, head_dim].
            values: [tokens, kv_heads, head_dim].
        """
        begin = page * PAGE
        rows = self.kv.view(self.kv_heads, -1, 2, self.head_dim)[:, begin : begin + len(keys)]
        rows[:, :, 0] = keys.transpose(0, 1)
        rows[:, :, 1] = values.transpose(0, 1)

    def code(self, pages: Tensor) -> None:
        """Write the codes and the means of pages that have just filled.

        Computed from the stored keys alone, so a code does not depend on how the prompt was cut
        into chunks.

        Args:
            pages: int64 [filled], physical pages.
        """
        if pages.numel() == 0:
            return
        wide = torch.promote_types(self.kv.dtype, torch.float32)
        keys, values = self.kv[:, pages].to(wide).unbind(3)  # [kv_heads, filled, 64, head_dim]
        mean = keys.mean(2).to(self.kv.dtype)  # [kv_heads, filled, head_dim]
        self.key_mean[:, pages] = mean
        self.value_mean[:, pages] = values.mean(2).to(self.kv.dtype)
        self.spread[:, pages] = (keys - mean.to(wide)[:, :, None]).square().mean((2, 3)).float()
        centre = stored_centre(mean)
        codes, scale = encode(keys, centre)
        self.centre[:, pages], self.codes[:, pages] = centre, codes
        self.scale[:, pages] = stored_scale(scale)

    def soundness(self, pages: Tensor) -> Tensor:
        """Sums that are finite where all keys and values of complete pages are.

        Args:
            pages: int64 [pages], physical pages, coded.

        Returns:
            float32 [pages].
        """
        values = self.value_mean[:, pages].float().sum((0, 2))  # [pages]
        return values + self.spread[:, pages].sum(0)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page, for a sequence that goes its own way in a page it shared."""
        for part in self.parts:
            part[:, target] = part[:, source]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the keys of decode rows lie: `sequences` block tables, `queries` rows of each.

    Rows are numbered sequence by sequence. A row sees the keys `start <= key < length`; its own
    key is the last of them.
    """

    block_tables: Tensor  # int64 [sequences, pages]  physical pages, 0 behind the last
    lengths: Tensor  # int64 [rows]  end of the visible keys
    starts: Tensor  # int64 [rows]  first visible key: 0, or the sliding window's edge

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.block_tables.shape[0]

    @property
    def queries(self) -> int:
        """Rows of each sequence."""
        return self.lengths.shape[0] // self.sequences

    @property
    def visible(self) -> Tensor:
        """int64 [rows], keys each row may see."""
        return self.lengths - self.starts

    @property
    def recent_page(self) -> Tensor:
        """int64 [rows], the page with which each row's always-kept window begins."""
        return (self.lengths // PAGE - 1).clamp_min(0)

    def within(self, window: int | None) -> Rows:
        """These rows under a sliding window of `window` keys, self included."""
        if window is None:
            return self
        return Rows(self.block_tables, self.lengths, (self.lengths - window).clamp_min(0))

    def pieces(self, most: int) -> Iterator[tuple[slice, Rows]]:
        """These rows in pieces of at most `most`: whole sequences together, or a part of one."""
        queries, total = self.queries, self.sequences
        together = max(1, most // queries)
        for sequence in range(0, total, together):
            tables = self.block_tables[sequence : sequence + together]
            stop = min(sequence + together, total) * queries
            for start in range(sequence * queries, stop, most):
                part = slice(start, min(start + most, stop))
                yield part, Rows(tables, self.lengths[part], self.starts[part])

    def only(self, rows: Tensor) -> Rows:
        """The rows numbered `rows` int64 [some], each as a sequence of its own."""
        tables = self.block_tables[rows // self.queries]
        return Rows(tables, self.lengths[rows], self.starts[rows])

    def slots(self, positions: Tensor) -> Tensor:
        """Physical slots of logical positions.

        Args:
            positions: int64 [rows, ...], each within its row's block table.

        Returns:
            int64 [rows, ...], physical page * 64 + offset.
        """
        tables = self.block_tables.repeat_interleave(self.queries, dim=0)  # [rows, pages]
        flat = positions.flatten(1)  # [rows, positions]
        page = flat >> PAGE_BITS  # integer division is several times slower
        # The offset within the page stays, the page's number changes.
        return (flat + ((tables.gather(1, page) - page) << PAGE_BITS)).view(positions.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence: a prefill chunk or a decode token."""

    block_table: Tensor  # int64 [pages]  physical pages
    run: tuple[int, int]  # its first page, and how many lie in a row from that one on
    start: int  # position of the first token; the keys before it are cached
    tokens: int
    # What its tiles read by patterns, once known: all layers share it. By pattern and KV heads.
    known: dict[tuple[Pattern, int], tuple[TileSelection, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def tiles(self) -> int:
        """Pages that its tokens lie in."""
        return len(self.block_table) - self.start // PAGE

    @staticmethod
    def of(block_table: list[int], start: int, tokens: int, device: torch.device) -> Segment:
        """The segment of `tokens` tokens at position `start`."""
        pages = block_table[: -(-(start + tokens) // PAGE)]
        apart = (number for number, page in enumerate(pages) if page != pages[0] + number)
        run = (pages[0], next(apart, len(pages)))
        return Segment(torch.tensor(pages, device=device), run, start, tokens)


def neighbours(pages: Tensor) -> int | None:
    """The first of physical `pages` [n] when each lies right behind the one before it."""
    count = pages.shape[0]
    if count == 0:
        return None
    first = int(pages[0])
    run = torch.arange(first, first + count, device=pages.device)
    return first if torch.equal(pages, run) else None
