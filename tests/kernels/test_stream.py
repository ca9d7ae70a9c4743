"""Norms before products and sums behind them, in the products' launches: as if each had its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.gpu.layer import add_norm
from kernels.gpu.linear import LINES, MOST, Norm, add_linear, gated_linear, linear
from kernels.gpu.stream import Stream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not round to bfloat16 as a GPU does.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SHAPES = [(1, 256, 48), (2, 100, 17), (3, 6, 33), (5, 50, 16), (MOST, 272, 5)]
"""Rows, inputs, outputs."""
EPS = 1e-5


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def noise(*size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def squares_of(x, parts=3):
    """As a product leaves them: added up over some of the channels each."""
    wide = F.pad(x.float().square(), (0, -x.shape[1] % parts))
    return wide.unflatten(-1, (parts, -1)).sum(-1)


def assert_nearly_equal(actual, expected, ulps=4):
    """Equal but for values that a norm whose squares are added in another order rounds over.

    What is off by a unit in a norm moves a sum over it by that unit's share.
    """
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=ulps * eps, atol=ulps * eps)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_norm_in_a_product_is_one_before_it(rows, inputs, outputs, biased, dtype):
    x, factor = 3 * noise(rows, inputs, dtype=dtype), 1 + noise(inputs, seed=1, dtype=dtype) / 4
    weight = noise(2 * outputs, inputs, seed=2, dtype=dtype) / inputs**0.5
    bias = noise(2 * outputs, seed=3, dtype=dtype) if biased else None
    norm = Norm(factor, EPS, squares_of(x))
    _, normed = add_norm(x, None, factor, EPS)
    assert_nearly_equal(linear(x, weight, bias, norm=norm), linear(normed, weight, bias), ulps=8)
    gated = gated_linear(x, weight, bias, norm=norm)
    assert_nearly_equal(gated, gated_linear(normed, weight, bias), ulps=16)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_sum_behind_a_product_is_rounded_as_both(rows, inputs, outputs, biased, dtype):
    x, hidden = noise(rows, inputs, dtype=dtype), noise(rows, outputs, seed=1, dtype=dtype)
    weight = noise(outputs, inputs, seed=2, dtype=dtype)
    bias = noise(outputs, seed=3, dtype=dtype) if biased else None
    before = hidden.clone()
    total, squares = add_linear(x, weight, bias, hidden)
    assert torch.equal(total, hidden + linear(x, weight, bias))
    assert torch.equal(hidden, before)
    assert squares.shape == (rows, -(-outputs // LINES)) and squares.dtype == torch.float32
    torch.testing.assert_close(squares.sum(-1), total.float().square().sum(-1), rtol=1e-5, atol=0)


def test_a_product_is_written_where_it_belongs(dtype):
    for rows in (3, MOST + 1):
        x, weight = noise(rows, 40, dtype=dtype), noise(21, 40, seed=1, dtype=dtype)
        room = torch.full((rows + 1, 21), torch.nan, device=DEVICE)
        given = linear(x, weight, output=room[:rows])
        assert given.data_ptr() == room.data_ptr()
        assert torch.equal(room[:rows], linear(x, weight).float())
        assert room[rows:].isnan().all()


def test_a_row_gives_the_same_in_any_company(dtype):
    x, factor = noise(MOST, 300, dtype=dtype), noise(300, seed=1, dtype=dtype)
    weight, hidden = noise(50, 300, seed=2, dtype=dtype), noise(MOST, 50, seed=3, dtype=dtype)

    def products(rows):
        norm = Norm(factor, EPS, squares_of(x[rows]))
        sums = add_linear(x[rows], weight, None, hidden[rows])
        return [linear(x[rows], weight, norm=norm), gated_linear(x[rows], weight, norm=norm), *sums]

    together = products(slice(MOST))
    for row in range(MOST):
        alone = products(slice(row, row + 1))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_harms_no_other(bad, dtype):
    x, factor = noise(3, 70, dtype=dtype), 1 + noise(70, seed=1, dtype=dtype) / 4
    weight, hidden = noise(20, 70, seed=2, dtype=dtype), noise(3, 20, seed=3, dtype=dtype)

    def products():
        norm = Norm(factor, EPS, squares_of(x))
        sums = add_linear(x, weight, None, hidden)
        return [linear(x, weight, norm=norm), gated_linear(x, weight, norm=norm), *sums]

    before = products()
    x[1, 5] = bad
    for one, other in zip(products(), before, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
        assert not one[1].isfinite().all()


def test_a_row_of_zeros_has_a_norm_of_zeros(dtype):
    x, weight = noise(2, 40, dtype=dtype), noise(16, 40, seed=1, dtype=dtype)
    x[0] = 0
    norm = Norm(noise(40, seed=2, dtype=dtype), EPS, squares_of(x))
    assert linear(x, weight, norm=norm)[0].eq(0).all()


@pytest.mark.parametrize("rows", [1, 4, MOST, MOST + 1])
def test_a_stream_is_what_separate_operations_leave(rows, dtype):
    """Two layers' worth: norms, products and sums, the first norm behind no product."""
    size, inner = 56, 72
    hidden = noise(rows, size, dtype=dtype)
    stream = Stream(hidden)
    for layer in range(2):
        norm = (1 + noise(size, seed=10 + layer, dtype=dtype) / 4, EPS)
        first = noise(inner, size, seed=20 + layer, dtype=dtype) / size**0.5
        gates = noise(2 * inner, size, seed=30 + layer, dtype=dtype) / size**0.5
        second = noise(size, inner, seed=40 + layer, dtype=dtype) / inner**0.5
        bias = noise(size, seed=50 + layer, dtype=dtype)

        x = stream.linear(norm, first, None)
        _, normed = add_norm(hidden, None, *norm)
        assert_nearly_equal(x, F.linear(normed, first), ulps=16)
        stream.add(x, second, bias)
        hidden = hidden + F.linear(x, second, bias)

        x = stream.gated_linear(norm, gates, None)
        _, normed = add_norm(hidden, None, *norm)
        gate, up = F.linear(normed, gates).chunk(2, dim=-1)
        assert_nearly_equal(x, F.silu(gate) * up, ulps=32)
        stream.add(x, second, None)
        hidden = hidden + F.linear(x, second)
    finite = torch.full((rows,), torch.nan, device=DEVICE)
    _, normed = add_norm(hidden, None, *norm)
    assert_nearly_equal(stream.normed(norm, finite), normed, ulps=16)
    assert finite.eq(1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_told(bad, dtype):
    for size in (100, 64):
        hidden = noise(4, size, dtype=dtype)
        hidden[1, size - 1], hidden[3, 0] = bad, bad
        finite = torch.full((4,), torch.nan, device=DEVICE)
        _, normed = add_norm(hidden, None, torch.ones_like(hidden[0]), EPS, finite=finite)
        assert finite.tolist() == [1, 0, 1, 0]
        assert torch.equal(finite, normed.isfinite().all(-1).float())
