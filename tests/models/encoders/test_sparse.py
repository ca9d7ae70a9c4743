"""A text's attention, with keys that count several times: against a softmax over a multiset."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kernels.attention import Impl
from kernels.cache import LayerCache
from models.encoders import bigbird, longformer
from models.encoders.random_blocks import drawn
from models.encoders.sparse import Place, attend
from models.encoders.texts import Shape

CPU = torch.device("cpu")
SHAPES = [Shape(400, 400), Shape(333, 400), Shape(400, 400, ((0, 90), (100, 400)))]


def counted(blocks, shape, layer, head):
    """How many times each token counts each other one: [tokens, tokens]."""
    size, count = blocks.size, -(-shape.padded // blocks.size)
    rows = drawn(layer, blocks.heads, count, size, blocks.random, blocks.longest)[head]
    table = torch.zeros(count, count, dtype=torch.float64)
    for block in range(count):
        seen = {block - 1, block, block + 1, 0, count - 1} & set(range(count))
        if block in (0, count - 1):
            seen, random = set(range(count)), ()
        else:
            random = rows[block - 1] if blocks.regime == "published" else (0,) * blocks.random
        for other, times in (Counter(seen) + Counter(random)).items():
            table[block, other] = times
    token = torch.arange(shape.tokens) // size
    table = table[token[:, None], token]
    mask = torch.zeros(shape.tokens, dtype=torch.float64)
    for begin, end in shape.spans or ((0, shape.tokens),):
        mask[begin:end] = 1
    return table * mask


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH, Impl.TRITON])
@pytest.mark.parametrize("regime", ["published", "transformers_eval"])
@pytest.mark.parametrize("size", [16, 64])
def test_bigbird(impl, regime, size):
    blocks = bigbird.Blocks(
        layers=1, heads=2, size=size, random=1, longest=4096, sparse_above=6 * size, regime=regime
    )
    dtype = torch.float32 if impl is Impl.TRITON else torch.float64
    shapes = SHAPES if size == 16 else [Shape(430, 448), Shape(400, 448)]
    for shape in shapes if impl is Impl.TORCH else shapes[-1:]:
        generator = torch.Generator().manual_seed(0)
        query, keys, values = (
            torch.randn(shape.tokens, 2, 16, generator=generator, dtype=dtype) for _ in range(3)
        )
        cache = LayerCache.allocate(-(-shape.tokens // 64) + 1, 2, 16, dtype, CPU)
        cache.kv.fill_(torch.nan)  # behind the last key anything may lie
        place = Place.of(cache, 1, shape.tokens, CPU)
        place.write(keys, values)
        for layer, plan in enumerate(bigbird.plans(blocks, shape, CPU)):
            found = attend(query, place, plan, 0.25, impl)
            for head in range(2):
                scores = (query[:, head] @ keys[:, head].T).double() * 0.25
                scores = scores + counted(blocks, shape, layer, head).log()
                wanted = scores.softmax(-1) @ values[:, head].double()
                there = ~wanted.isnan()[:, 0]
                torch.testing.assert_close(
                    found[there, head].double(), wanted[there], rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("impl", [Impl.TORCH, Impl.TRITON])
def test_longformer(impl):
    shape = Shape(300, 300, ((0, 250), (255, 300)), (0, 130, 290))
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(300, 2, 16, generator=generator) for _ in range(3))
    place = Place.of(LayerCache.allocate(5, 2, 16, torch.float32, CPU), 0, 300, CPU)
    place.write(keys, values)
    found = attend(query, place, longformer.plan(64, 2, shape, CPU), 0.25, impl)
    token = torch.arange(300)
    seen = (token[:, None] - token).abs() <= 32
    seen[:, list(shape.global_tokens)] = True
    seen[:, 250:255] = False
    for head in range(2):
        scores = (query[:, head] @ keys[:, head].T * 0.25).masked_fill(~seen, -torch.inf)
        wanted = scores.softmax(-1) @ values[:, head]
        torch.testing.assert_close(found[:, head], wanted, rtol=0, atol=1e-5)


def test_few_and_many_global_rows_agree():
    torch.manual_seed(0)
    hidden = torch.randn(100, 32, dtype=torch.float64)
    query, key, value = (torch.nn.Linear(32, 32, dtype=torch.float64) for _ in range(3))
    few, many, shape = torch.tensor([3, 50]), torch.arange(60), Shape(100, 100, ((0, 90),))
    with torch.no_grad():
        some = longformer.global_rows(hidden, few, shape, query, key, value, 2)
        every = longformer.global_rows(hidden, many, shape, query, key, value, 2)
    torch.testing.assert_close(some, every[[3, 50]], rtol=0, atol=1e-12)


def test_heads_and_layers_draw_for_themselves():
    table = {
        (layer, head): drawn(layer, 3, 40, 16, 2, 4096)[head]
        for layer in (0, 1)
        for head in range(3)
    }
    assert len(set(table.values())) == 6
    for rows in table.values():
        for block, row in enumerate(rows, start=1):
            assert len(set(row)) == 2
            assert not set(row) & {0, 39, block - 1, block, block + 1}
