"""Codes of keys: what they are, and that their errors are as small as their definition says."""

from __future__ import annotations

import pytest
import torch

from kernels.codes import (
    FARTHEST,
    MOST,
    NOISE,
    WORD,
    by_fours,
    by_keys,
    encode,
    estimate,
    rotation,
    signs_of,
    stored_centre,
    stored_scale,
    words,
)
from kernels.page import PAGE


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_a_code_is_the_signs_of_the_rotated_rest(head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(2, 3, PAGE, head_dim, generator=generator, dtype=torch.float64) + 1
    mean = keys.mean(2)
    signs, scale = encode(keys, mean)
    turned = (keys - mean[:, :, None]) @ rotation(head_dim, keys.dtype, keys.device)
    torch.testing.assert_close(turned.norm(dim=-1), (keys - mean[:, :, None]).norm(dim=-1))
    assert signs.shape == (2, 3, 16, words(head_dim), 4)
    signs = by_keys(signs.transpose(2, 3))  # [2, 3, words, 64]
    for channel in range(head_dim):
        bit = signs[:, :, channel // WORD] >> (channel % WORD) & 1
        assert torch.equal(bit == 1, turned[..., channel] >= 0)
    expected = turned.square().sum(-1) / turned.abs().sum(-1)
    torch.testing.assert_close(by_keys(scale), expected.float())


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_signs_unpack_to_what_was_packed(head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(3, 2, PAGE, head_dim, generator=generator, dtype=torch.float64)
    codes, _ = encode(keys, keys.mean(2))
    turned = (keys - keys.mean(2, keepdim=True)) @ rotation(head_dim, keys.dtype, keys.device)
    expected = torch.where(turned >= 0, 1.0, -1.0).flatten(1, 2)
    assert torch.equal(signs_of(codes, torch.bfloat16, head_dim).double(), expected.double())


def test_codes_lie_by_fours_of_keys_eight_apart():
    fours = by_fours(torch.arange(PAGE))
    assert fours[:2].tolist() == [[0, 8, 16, 24], [1, 9, 17, 25]]
    assert fours[8].tolist() == [32, 40, 48, 56]
    assert torch.equal(by_keys(fours), torch.arange(PAGE))


def test_centres_and_scales_are_stored_as_near_as_there_is():
    mean = torch.tensor([0.0, 1.0, -3.3, 1e4, -1e9, 2**-12, torch.nan])
    expected = torch.tensor([0, 1, -3.25, FARTHEST, -FARTHEST, 0, torch.nan])
    assert torch.equal(stored_centre(mean).float().nan_to_num(7), expected.nan_to_num(7))
    scale = torch.tensor([0.0, 3.3, MOST, MOST + 1, torch.inf, torch.nan])
    assert stored_scale(scale).float().nan_to_num(-1).tolist() == [0, 3.25, MOST, -1, -1, -1]


@pytest.mark.parametrize("gain", [0.02, 1.0, 30.0])
def test_eight_bits_lose_little_of_what_signs_tell(gain):
    """Of an estimate's variance, with centres that are as far away as keys are from them."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(64, PAGE, 128, generator=generator)
    keys += 2 * torch.randn(64, 1, 128, generator=generator)
    keys, query = keys * gain, torch.randn(128, generator=generator)
    mean, variances = keys.mean(1), []
    for centre, rounded in ((mean, False), (stored_centre(mean).float(), True)):
        _, scale = encode(keys, centre)
        scale = by_keys(stored_scale(scale).float() if rounded else scale)
        turned = (keys - centre[:, None]) @ rotation(128, keys.dtype, keys.device)
        signs = torch.where(turned >= 0, 1.0, -1.0)
        score = signs @ (query @ rotation(128, keys.dtype, keys.device)) * scale
        error = score + (centre @ query)[:, None] - keys @ query
        variances.append(float(error.square().mean()))
    assert variances[1] < 1.03 * variances[0]


def test_keys_too_far_away_for_a_code_are_read_for_certain(paged):
    case = paged([PAGE * 4], 1, 64, torch.float32)
    page = case.tables[0][0]
    case.cache.kv[0, page, :, 0] *= 30
    case.cache.kv[0, page, 7, 0, 3] = 1e5
    case.cache.code(torch.tensor([page]))
    lost = estimate(case.query(1), case.cache, case.rows, 0, 1)[0, 0].isnan()
    assert lost[:, 7].all() and lost.sum() == len(lost)


def test_equal_keys_have_a_scale_of_zero():
    keys = torch.full((1, PAGE, 64), 0.5)
    _, scale = encode(keys, keys.mean(1))
    assert (scale == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1024], [1024, 640]])
def test_estimates_err_as_much_as_they_say(paged, dtype, lengths):
    case = paged(lengths, 2, 128, dtype, queries=4)
    wide = torch.promote_types(dtype, torch.float32)
    query = case.query(3).to(wide)
    scores = estimate(query, case.cache, case.rows, 0, 10)
    assert scores.shape == (4 * len(lengths), 2, 3, 640)
    tables = case.rows.block_tables[:, :10]
    scale = by_keys(case.cache.scale[:, tables].float())
    noise = NOISE * scale.square().flatten(2).transpose(0, 1)
    noise = noise.repeat_interleave(4, 0)  # [rows, kv_heads, keys]
    grouped = query.view(-1, 2, 3, 128)
    variance = noise[:, :, None] * grouped.square().sum(-1)[..., None]
    keys = torch.stack([keys[:640] for keys in case.keys]).to(wide)  # [sequences, keys, kv, d]
    exact = torch.einsum("sqhgd,skhd->sqhgk", grouped.view(len(lengths), 4, 2, 3, 128), keys)
    error = scores + variance / 2 - exact.flatten(0, 1)
    assert error.mean().abs() < 0.1 * variance.sqrt().mean()
    assert 0.9 < float((error.square() / variance).mean()) < 1.1
    both = (error[:, :, 0] * error[:, :, 1]).mean()
    overlap = (grouped[:, :, 0] * grouped[:, :, 1]).sum(-1)
    assert abs(both - (overlap[..., None] * noise).mean()) < 0.1 * variance.mean()


def test_a_key_along_its_query_is_estimated_without_error(paged):
    case = paged([PAGE * 2], 1, 64, torch.float64)
    page = case.tables[0][0]
    keys = case.cache.kv[0, page, :, 0]
    centre = case.cache.centre[0, page].double()
    query = keys[5] - centre
    score = estimate(query[None, None], case.cache, case.rows, 0, 1)[0, 0, 0, 5]
    stored = by_keys(case.cache.scale[0, page].double())[5]
    score += query @ query * NOISE * stored.square() / 2
    # But for what the stored scale has lost.
    _, scale = encode(keys, centre)
    scale = by_keys(scale)[5]
    assert abs(stored / scale - 1) <= 2**-4
    expected = query @ centre + query @ query * stored / scale
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)
