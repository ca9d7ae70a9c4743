"""Numba's kernels between a layer's products against torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.attention import Impl
from kernels.cache import LayerCache
from kernels.cpu.layer import LEAST, add_norm, rotate_and_write, silu_mul
from models.norms import RMSNorm
from models.rope import Rotary
from models.rope_parameters import RopeParameters

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 3, LEAST + 5]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def noise(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours, theirs, ulps=4):
    """Equal but for few values that a sum in another order rounds the other way."""
    eps = torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=ulps * eps, atol=torch.finfo(theirs.dtype).tiny)
    if theirs.dtype == torch.bfloat16:
        assert int((ours != theirs).sum()) <= 1 + ours.numel() // 100


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 100, 384])
def test_the_sum_and_its_norm_are_torchs(rows, size, dtype):
    norm = RMSNorm(size, 1e-5, dtype, "cpu", Impl.TORCH).requires_grad_(False)
    norm.weight.copy_(1 + noise(size, seed=5, dtype=dtype) / 4)
    hidden, update = noise(rows, size, dtype=dtype), noise(rows, size, seed=1, dtype=dtype)
    for added in (update, None):
        total, normed = add_norm(hidden, added, norm.weight, norm.eps)
        assert torch.equal(total, hidden if added is None else hidden + update)
        assert_near(normed, norm(total))
    turned = noise(size, rows, dtype=dtype).T  # rows are not contiguous
    assert_near(add_norm(turned, None, norm.weight, norm.eps)[1], norm(turned))


def test_what_is_not_finite_stays_in_its_row(dtype):
    hidden = noise(4, 70, dtype=dtype)
    hidden[0], hidden[1, 3], hidden[2, 5] = 0, torch.inf, torch.nan
    weight = torch.ones(70, dtype=dtype)
    _, normed = add_norm(hidden, torch.zeros_like(hidden), weight, 1e-5)
    assert normed[0].eq(0).all() and normed[3].isfinite().all()
    assert not normed[1].isfinite().all() and normed[2].isnan().all()
    assert silu_mul(hidden.repeat(1, 2))[2].isnan().sum() == 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [7, 1024])
def test_swiglu_is_torchs(rows, size, dtype):
    both = 8 * noise(rows, 2 * size, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    assert_near(silu_mul(both), F.silu(gate) * up, ulps=16)
    # Gates far off: e ** 100 is more than float32 holds.
    far = torch.tensor([[-100.0, 100.0, 1.0, 1.0]], dtype=dtype)
    torch.testing.assert_close(silu_mul(far), F.silu(far[:, :2]), rtol=0.01, atol=1e-30)


@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 2), (2, 3, 80), (2, 2, 128)])
def test_queries_and_cache_are_torchs(rows, kv_heads, group, head_dim, dtype):
    heads = kv_heads * group
    qkv = noise(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    rotary = Rotary(RopeParameters(original_max_position=512), head_dim, dtype, "cpu")
    angles = rotary.angles(torch.arange(rows) * 1000)
    slots = torch.randperm(4 * 64, generator=torch.Generator().manual_seed(1))[:rows]
    ours, theirs = (LayerCache.allocate(4, kv_heads, head_dim, dtype, "cpu") for _ in range(2))
    query = rotate_and_write(qkv, angles, slots, ours)
    parts = torch.split(qkv.view(rows, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
    expected, keys = (Rotary.rotate(part, angles) for part in parts[:2])
    theirs.write(slots, keys, parts[2])
    eps = torch.finfo(dtype).eps  # a product and a sum may be rounded once, together
    torch.testing.assert_close(query, expected, rtol=eps, atol=eps)
    torch.testing.assert_close(ours.kv, theirs.kv, rtol=eps, atol=eps)
