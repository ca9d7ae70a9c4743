"""The kernels between a layer's products against torch's operations: equal, or nearly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.attention import Impl
from kernels.cache import LayerCache
from kernels.codes import by_keys, rotation
from kernels.gpu.coder import Coder
from kernels.gpu.layer import add_norm, silu_mul
from kernels.gpu.linear import MOST, gated_linear, linear
from kernels.gpu.rotate import rotate_and_write
from kernels.page import PAGE
from models.norms import RMSNorm
from models.rope import Rotary
from models.rope_parameters import RopeParameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not round to bfloat16 as a GPU does.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
HEADS = [(1, 1, 64), (2, 1, 80), (1, 7, 96), (3, 4, 128), (1, 16, 256), (2, 3, 16)]
"""KV heads, group, head dimension."""
EPS = torch.finfo(torch.float32).eps
"""Of what the kernels add up in."""
PAGES = 5
SLOTS = [2 * PAGE + 63, -1, 17, 4 * PAGE + 63, 3 * PAGE]
"""Two rows that complete a page, one of padding, and one that begins a page."""
FILLED = [2, 4]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def noise(*size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_near(actual, expected, dtype, ulps=4):
    """Equal but for few values that a sum in another order rounds the other way."""
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    torch.testing.assert_close(actual, expected, rtol=ulps * eps, atol=tiny)
    assert_mostly_equal(actual, expected, dtype)


def assert_mostly_equal(actual, expected, dtype):
    """Of values that are rounded in the same places one, and a hundredth, may go the other way."""
    if dtype != torch.float32:
        assert int((actual != expected).sum()) <= 1 + actual.numel() // 100


def norm_of(size, dtype, seed=5):
    norm = RMSNorm(size, 1e-5, dtype, DEVICE, Impl.TORCH).requires_grad_(False)
    norm.weight.copy_(1 + noise(size, seed=seed, dtype=dtype) / 4)
    return norm


@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (3, 100), (5, 1), (2, 2560)])
def test_the_sum_and_its_norm_are_those_of_the_decoder(rows, size, dtype):
    hidden, update = noise(rows, size, dtype=dtype), noise(rows, size, seed=1, dtype=dtype)
    norm = norm_of(size, dtype)
    total, normed = add_norm(hidden, update, norm.weight, norm.eps)
    assert torch.equal(total, hidden + update)
    assert_near(normed, norm(total), dtype)

    same, normed = add_norm(hidden, None, norm.weight, norm.eps)
    assert same is hidden
    assert_near(normed, norm(hidden), dtype)


def test_a_row_of_zeros_and_one_that_is_not_finite_stay_among_themselves(dtype):
    hidden = noise(3, 70, dtype=dtype)
    hidden[0], hidden[1, 3] = 0, torch.inf
    norm = norm_of(70, dtype)
    _, normed = add_norm(hidden, torch.zeros_like(hidden), norm.weight, norm.eps)
    assert normed[0].eq(0).all()
    assert not normed[1].isfinite().all()
    assert_near(normed[2], norm(hidden[2]), dtype)


@pytest.mark.parametrize(("rows", "size"), [(1, 1500), (3, 1024), (2, 7)])
def test_swiglu_is_that_of_the_decoder(rows, size, dtype):
    gate_up = 4 * noise(rows, 2 * size, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    # A GPU's fast exponential is off by some units in the last place where its argument is large.
    assert_near(silu_mul(gate_up), F.silu(gate) * up, dtype, ulps=32)


PRODUCTS = [(1, 256, 40), (3, 100, 17), (MOST, 1040, 5), (2, 6, 16), (MOST + 1, 33, 20)]
"""Rows, inputs, outputs."""


def product(x, weight, bias):
    """A product in float64, and how far from it one may be that float32 adds up.

    Each partial sum loses an eps of itself at the most. There are as many as channels, and with
    random signs all are far smaller than the sum of the magnitudes: what they lose together is
    about half an eps of that sum one after the other, and less in any other order.
    """
    bias = torch.zeros(len(weight), device=x.device) if bias is None else bias
    x, weight, bias = x.double(), weight.double(), bias.double()
    magnitudes = F.linear(x.abs(), weight.abs(), bias.abs())
    return F.linear(x, weight, bias), 2 * EPS * magnitudes


def rounding(exact, dtype):
    """Half a unit in the last place; of the smallest numbers, too."""
    info = torch.finfo(dtype)
    return info.eps / 2 * exact.abs() + info.eps * info.tiny


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), PRODUCTS)
def test_products_are_those_of_torch(rows, inputs, outputs, biased, dtype):
    x, weight = noise(rows, inputs, dtype=dtype), noise(2 * outputs, inputs, seed=1, dtype=dtype)
    bias = noise(2 * outputs, seed=2, dtype=dtype) if biased else None
    exact, error = product(x, weight, bias)
    error = error + rounding(exact, dtype)
    ours = linear(x, weight, bias)
    assert_within(ours, exact, error)
    taken = torch.empty_like(ours, dtype=torch.float32)
    assert linear(x, weight, bias, taken) is taken
    assert torch.equal(taken, ours.float())

    # The errors of both halves, through silu, whose slope is below 1.1, and the product.
    (gate, up), (gate_error, up_error) = exact.chunk(2, dim=-1), error.chunk(2, dim=-1)
    silu = F.silu(gate)
    # A fast exponential is off by some units in the last place, the more the larger its argument.
    exponential = EPS * (4 + gate.abs()) * silu.abs()
    silu_error = 1.1 * gate_error + exponential + rounding(silu, dtype)
    whole = (
        silu_error * up.abs() + (silu.abs() + silu_error) * up_error + rounding(silu * up, dtype)
    )
    gated = gated_linear(x, weight, bias)
    assert_within(gated, silu * up, whole)
    # Its own sums are those of `linear`, and rounded before anything is done with them.
    gate, up = ours.chunk(2, dim=-1)
    assert_mostly_equal(gated, F.silu(gate) * up, dtype)


def assert_within(actual, exact, error):
    off = (actual.double() - exact).abs() / error
    assert float(off.max()) <= 1


def test_a_row_gives_the_same_in_any_company(dtype):
    x, weight = noise(MOST, 300, dtype=dtype), noise(50, 300, seed=1, dtype=dtype)
    together = linear(x, weight)
    for row in range(MOST):
        assert torch.equal(linear(x[row : row + 1], weight)[0], together[row])


class Case:
    """A step's projections, and two caches with the same keys."""

    def __init__(self, kv_heads, group, head_dim, dtype, *, normed):
        self.parts = [kv_heads * group, kv_heads, kv_heads]
        self.qkv = noise(len(SLOTS), sum(self.parts) * head_dim, dtype=dtype)
        self.slots = torch.tensor(SLOTS, device=DEVICE)
        rotary = Rotary(RopeParameters(original_max_position=512), head_dim, dtype, DEVICE)
        self.angles = rotary.angles(torch.tensor([7, 0, 100_000, 63, 64], device=DEVICE))
        self.norms = [norm_of(head_dim, dtype, seed) for seed in (2, 3)] if normed else None
        self.ours, self.theirs = (
            LayerCache.allocate(PAGES, kv_heads, head_dim, dtype, DEVICE) for _ in range(2)
        )
        keys = noise(*self.ours.kv.shape, seed=4, dtype=dtype)
        for cache in (self.ours, self.theirs):
            cache.kv.copy_(keys)
            cache.codes.fill_(7)
        self.coder = Coder([self.ours])

    def rotate_and_write(self):
        norms = None if self.norms is None else tuple(norm.weight for norm in self.norms)
        eps = 0.0 if self.norms is None else self.norms[0].eps
        query = rotate_and_write(self.qkv, self.angles, self.slots, self.ours, norms, eps)
        self.coder(self.slots)
        return query

    def eagerly(self):
        heads = self.qkv.view(len(SLOTS), -1, self.ours.head_dim)
        query, keys, values = torch.split(heads, self.parts, dim=1)
        if self.norms is not None:
            query, keys = self.norms[0](query), self.norms[1](keys)
        query, keys = (Rotary.rotate(x, self.angles) for x in (query, keys))
        real = self.slots >= 0
        self.theirs.write(self.slots[real], keys[real], values[real])
        if real.any():
            self.theirs.code(torch.tensor(FILLED, device=DEVICE))
        return query


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_queries_and_cache_are_those_of_the_decoder(heads, normed, dtype):
    if DEVICE == "cpu" and dtype != torch.float32 and heads not in HEADS[1:3]:
        return  # the interpreter goes the same ways for all sizes
    case = Case(*heads, dtype, normed=normed)
    query, expected = case.rotate_and_write(), case.eagerly()
    ours, theirs = case.ours, case.theirs
    if not normed:  # nothing is summed up
        assert torch.equal(query, expected)
        assert torch.equal(ours.kv, theirs.kv)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(query, expected, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(ours.kv, theirs.kv, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(ours.key_mean, theirs.key_mean, rtol=4 * eps, atol=eps)
    torch.testing.assert_close(ours.value_mean, theirs.value_mean, rtol=4 * eps, atol=eps)
    torch.testing.assert_close(
        ours.spread, theirs.spread, rtol=1e-2 if eps > 1e-4 else 1e-5, atol=0
    )
    assert torch.equal(ours.centre.float(), theirs.centre.float())
    torch.testing.assert_close(ours.scale.float(), theirs.scale.float(), rtol=2**-3, atol=2**-9)
    assert_same_signs(ours, theirs)


def assert_same_signs(ours, theirs):
    """Equal but where a sum of products is nearly zero; pages that are not full have no codes."""
    place = torch.arange(32, device=DEVICE)
    other = by_keys((ours.codes ^ theirs.codes).transpose(2, 3))  # [kv_heads, pages, words, 64]
    other = other[..., None] >> place & 1  # [kv_heads, pages, words, 64, 32]
    rest = theirs.kv[:, :, :, 0].float() - theirs.centre.float()[:, :, None]
    turned = rest @ rotation(theirs.head_dim, torch.float32, rest.device)
    near = F.pad(turned.abs() < 1e-4, (0, 32 * other.shape[2] - theirs.head_dim))
    near = near.unflatten(-1, (-1, 32)).transpose(2, 3)  # [kv_heads, pages, words, 64, 32]
    assert not (other.bool() & ~near).any()
    unfilled = [page for page in range(PAGES) if page not in FILLED]
    assert ours.codes[:, unfilled].eq(7).all()
    assert ours.key_mean[:, unfilled].eq(0).all()


def test_padding_leaves_the_cache_alone(dtype):
    case = Case(2, 2, 64, dtype, normed=False)
    before = case.ours.kv.clone()
    case.slots.fill_(-1)
    assert torch.equal(case.rotate_and_write(), case.eagerly())
    assert torch.equal(case.ours.kv, before)
    assert case.ours.codes.eq(7).all()
