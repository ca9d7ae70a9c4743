"""Builders of caches whose pages are scattered, as an engine's are."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.cache import LayerCache, Rows
from kernels.page import PAGE


class Paged:
    """Sequences of random keys in one scattered cache, and the same keys side by side."""

    def __init__(self, lengths, kv_heads, head_dim, dtype=torch.float32, seed=0, queries=1):
        generator = torch.Generator().manual_seed(seed)
        pages = [-(-n // PAGE) for n in lengths]
        total = sum(pages) + 3
        order = list(range(total))
        random.Random(seed).shuffle(order)
        self.cache = LayerCache.allocate(total, kv_heads, head_dim, dtype, "cpu")
        # A read outside a sequence's keys or codes shows.
        for part in self.cache.parts:
            if part.is_floating_point():
                part.fill_(torch.nan)
        self.cache.codes.random_(generator=torch.Generator().manual_seed(seed))
        self.tables, self.keys, self.values = [], [], []
        for n, count in zip(lengths, pages, strict=True):
            table, order = order[:count], order[count:]
            k, v = (
                torch.randn(n, kv_heads, head_dim, generator=generator, dtype=torch.float64)
                for _ in range(2)
            )
            k, v = k.to(dtype), v.to(dtype)
            position = torch.arange(n)
            slots = torch.tensor(table)[position // PAGE] * PAGE + position % PAGE
            self.cache.write(slots, k, v)
            self.cache.code(torch.tensor(table[: n // PAGE], dtype=torch.int64))
            self.tables.append(table)
            self.keys.append(k)
            self.values.append(v)
        width = max(pages)
        ends = torch.tensor(lengths)[:, None] - torch.arange(queries - 1, -1, -1)
        self.rows = Rows(
            torch.tensor([t + [0] * (width - len(t)) for t in self.tables]),
            ends.flatten(),
            torch.zeros(len(lengths) * queries, dtype=torch.int64),
        )
        self.generator = generator
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype

    def query(self, group, rows=None):
        rows = self.rows.lengths.shape[0] if rows is None else rows
        shape = (rows, self.kv_heads * group, self.head_dim)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


@pytest.fixture(scope="session")
def paged():
    return Paged
