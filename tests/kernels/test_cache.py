"""The paged cache: what stands in it beside keys and values takes little memory."""

from __future__ import annotations

import pytest
import torch

from kernels.cache import LayerCache
from kernels.page import PAGE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_codes_and_means_take_a_fifteenth_of_the_memory_of_keys_and_values(head_dim, dtype):
    cache = LayerCache.allocate(3, 2, head_dim, dtype, "cpu")
    page = LayerCache.bytes_per_page(2, head_dim, dtype)
    assert 3 * page == sum(part.nbytes for part in cache.parts)
    pairs = 2 * PAGE * 2 * head_dim * dtype.itemsize
    assert 3 * pairs == cache.kv.nbytes
    assert page - pairs < pairs / 15
