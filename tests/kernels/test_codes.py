"""Codes of keys: what they are, and that their errors are as small as their definition says."""

from __future__ import annotations

import pytest
import torch

from kernels.codes import NOISE, WORD, encode, estimate, rotation, signs_of, words
from kernels.page import PAGE


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_a_code_is_the_signs_of_the_rotated_rest(head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(2, 3, PAGE, head_dim, generator=generator, dtype=torch.float64) + 1
    mean, signs, scale = encode(keys, torch.float64)
    torch.testing.assert_close(mean, keys.mean(2))
    turned = (keys - mean[:, :, None]) @ rotation(head_dim, keys.dtype, keys.device)
    torch.testing.assert_close(turned.norm(dim=-1), (keys - mean[:, :, None]).norm(dim=-1))
    assert signs.shape == (2, 3, words(head_dim), PAGE)
    for channel in range(head_dim):
        bit = signs[:, :, channel // WORD] >> (channel % WORD) & 1
        assert torch.equal(bit == 1, turned[..., channel] >= 0)
    torch.testing.assert_close(scale, turned.square().sum(-1) / turned.abs().sum(-1))


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_signs_unpack_to_what_was_packed(head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(3, 2, PAGE, head_dim, generator=generator, dtype=torch.float64)
    _, codes, _ = encode(keys, torch.float64)
    turned = (keys - keys.mean(2, keepdim=True)) @ rotation(head_dim, keys.dtype, keys.device)
    expected = torch.where(turned >= 0, 1.0, -1.0).flatten(1, 2)
    assert torch.equal(signs_of(codes, torch.bfloat16, head_dim).double(), expected.double())


def test_the_scan_by_bits_is_the_product_with_the_rounded_query():
    from kernels.scan_cpu import _rounded, scan

    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 5, PAGE, 96, generator=generator)
    mean, codes, scale = encode(keys, torch.float32)
    query = torch.randn(2, 7, 96, generator=generator)
    _, step, _ = _rounded(query)
    levels = (query / step[..., None] + 7.5).round().clamp(0, 15)
    rounded = (levels - 7.5) * step[..., None]
    assert (rounded - query).abs().max() <= step.max() / 2 + 1e-6
    centre = query @ mean.mT
    expected = rounded @ signs_of(codes, torch.float32, 96).mT * scale.flatten(1)[:, None]
    expected += centre.repeat_interleave(PAGE, -1)
    torch.testing.assert_close(scan(query, codes, scale, centre), expected, atol=1e-4, rtol=1e-4)


def test_equal_keys_have_a_scale_of_zero():
    keys = torch.full((1, PAGE, 64), 0.5)
    mean, _, scale = encode(keys, torch.float32)
    assert (mean == 0.5).all()
    assert (scale == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1024], [1024, 640]])
def test_estimates_err_as_much_as_they_say(paged, dtype, lengths):
    case = paged(lengths, 2, 128, dtype, queries=4)
    wide = torch.promote_types(dtype, torch.float32)
    query = case.query(3).to(wide)
    found = estimate(query, case.cache, case.rows, 0, 10)
    assert found.scores.shape == (4 * len(lengths), 2, 3, 640)
    keys = torch.stack([keys[:640] for keys in case.keys]).to(wide)  # [sequences, keys, kv, d]
    exact = torch.einsum("sqhgd,skhd->sqhgk", query.view(len(lengths), 4, 2, 3, 128), keys).flatten(
        0, 1
    )
    error = found.scores - exact
    predicted = found.noise[:, :, None] * query.view(-1, 2, 3, 128).square().sum(-1)[..., None]
    assert error.mean().abs() < 0.1 * predicted.sqrt().mean()
    assert 0.9 < float((error.square() / predicted).mean()) < 1.1
    both = (error[:, :, 0] * error[:, :, 1]).mean()
    overlap = (query.view(-1, 2, 3, 128)[:, :, 0] * query.view(-1, 2, 3, 128)[:, :, 1]).sum(-1)
    assert abs(both - (overlap[..., None] * found.noise).mean()) < 0.1 * predicted.mean()
    assert 0.36 < NOISE < 0.37


def test_a_key_along_its_query_is_estimated_without_error(paged):
    case = paged([PAGE * 2], 1, 64, torch.float64)
    keys = case.cache.kv[0, case.tables[0][0], :, 0]
    query = keys[5] - keys.mean(0)
    found = estimate(query[None, None], case.cache, case.rows, 0, 1)
    # But for the query's rounding to sixteen levels.
    torch.testing.assert_close(found.scores[0, 0, 0, 5], query @ keys[5], rtol=0.1, atol=0)
