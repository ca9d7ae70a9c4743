"""A step's attention in one launch: what rotating, writing and attending one by one do."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import Impl
from kernels.cache import LayerCache, Rows
from kernels.gpu import attend, dense_step
from kernels.gpu.attend import dense_decode
from kernels.gpu.dense_step import rotate_and_attend
from kernels.gpu.rotate import rotate_and_write
from kernels.page import PAGE
from models.norms import RMSNorm
from models.rope import Rotary
from models.rope_parameters import RopeParameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not round to bfloat16 as a GPU does.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = [PAGE, 1, 2 * PAGE + 2, 0, 3 * PAGE, 2 * PAGE + 1]
"""Two rows that complete a page, one of padding, one that begins a page, and others."""
STARTS = [0, 0, 70, 0, 129, 2 * PAGE]
PAGES = 4
SCALE = 0.2
HEADS = [(1, 4, 128, False), (2, 3, 16, True), (1, 1, 80, False), (1, 7, 24, True)]
"""KV heads, group, head dimension, whether heads are normalised."""
CASES = [
    (*heads, dtype)
    for place, heads in enumerate(HEADS)
    for dtype in (DTYPES if DEVICE == "cuda" else [DTYPES[place % 2]])
]
"""The interpreter takes its time."""


def noise(*size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


class Case:
    """A step's projections, and two caches with the same keys; what is no key is not a number."""

    def __init__(self, kv_heads, group, head_dim, dtype, *, normed):
        count = len(LENGTHS)
        lengths = torch.tensor(LENGTHS, device=DEVICE)
        order = torch.randperm(count * PAGES, generator=torch.Generator().manual_seed(1))
        tables = order.view(count, PAGES).to(DEVICE)
        self.rows = Rows(tables, lengths, torch.tensor(STARTS, device=DEVICE))
        own = (lengths - 1).clamp_min(0)
        slots = tables.gather(1, own[:, None] // PAGE)[:, 0] * PAGE + own % PAGE
        self.slots = slots.where(lengths > 0, -1)
        self.qkv = noise(count, (group + 2) * kv_heads * head_dim, dtype=dtype)
        self.angles = Rotary(
            RopeParameters(original_max_position=512), head_dim, dtype, DEVICE
        ).angles(own)
        self.norms, self.eps = None, 0.0
        if normed:
            weights = [1 + noise(head_dim, seed=seed, dtype=dtype) / 4 for seed in (2, 3)]
            self.norms, self.eps = tuple(weights), 1e-5
        self.ours, self.theirs = (
            LayerCache.allocate(count * PAGES, kv_heads, head_dim, dtype, DEVICE) for _ in range(2)
        )
        keys = noise(*self.ours.kv.shape, seed=4, dtype=dtype)
        position = torch.arange(PAGES * PAGE, device=DEVICE).view(PAGES, PAGE)
        for row, length in enumerate(LENGTHS):
            keys[:, tables[row]] = keys[:, tables[row]].masked_fill(
                (position >= length - 1)[None, :, :, None, None], torch.nan
            )
        for cache in (self.ours, self.theirs):
            cache.kv.copy_(keys)
            cache.codes.fill_(7)
        self.tickets = torch.zeros(count * kv_heads, dtype=torch.int32, device=DEVICE)

    def together(self):
        place = (self.slots, self.ours, self.rows, self.tickets)
        return rotate_and_attend(self.qkv, self.angles, *place, SCALE, self.norms, self.eps)

    def apart(self):
        query = rotate_and_write(
            self.qkv, self.angles, self.slots, self.theirs, self.norms, self.eps
        )
        return dense_decode(query, self.theirs, self.rows, SCALE)

    def check(self, found, expected):
        dtype = self.qkv.dtype
        tolerance = TOLERANCE[dtype]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
        assert found[0].dtype == dtype and found[0].is_contiguous()
        eps = 4 * torch.finfo(dtype).eps
        names = ("kv", "key_mean", "value_mean", "spread", "scale")
        for name in names:
            one, other = getattr(self.ours, name), getattr(self.theirs, name)
            rtol = 2**-7 if name == "scale" else 4 * eps
            torch.testing.assert_close(one, other, atol=eps, rtol=rtol, equal_nan=True)
        assert (self.ours.codes != self.theirs.codes).float().mean() < 0.01
        assert self.tickets.eq(0).all()


@pytest.mark.parametrize(("kv_heads", "group", "head_dim", "normed", "dtype"), CASES)
def test_in_one_launch_or_in_several(monkeypatch, kv_heads, group, head_dim, normed, dtype):
    case = Case(kv_heads, group, head_dim, dtype, normed=normed)
    expected = case.apart()
    case.check(case.together(), expected)
    # Run again, a step writes over what it wrote; its parts are joined by the last program to end,
    # or by a launch.
    monkeypatch.setattr(attend, "ALONE", 0)
    monkeypatch.setattr(attend, "RUN_BYTES", 64 * 128)
    case.check(case.together(), expected)
    if head_dim < 64:
        monkeypatch.setattr(dense_step, "JOINED", 0)
        case.check(case.together(), expected)


def test_padding_leaves_the_cache_alone():
    case = Case(2, 2, 32, torch.float32, normed=False)
    case.slots.fill_(-1)
    before = [part.clone() for part in case.ours.parts]
    output, lse = case.together()
    assert output[3].eq(0).all() and lse[3].eq(-torch.inf).all()
    for one, other in zip(before, case.ours.parts, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_harms_no_other(bad):
    outputs = []
    for value in (0.0, bad):
        case = Case(2, 2, 32, torch.float32, normed=True)
        case.qkv[2, 3] += value
        outputs.append(case.together()[0])
    for row in range(len(LENGTHS)):
        assert torch.equal(outputs[0][row], outputs[1][row]) == (row != 2)
    assert not outputs[1][2].isfinite().all()
    assert case.tickets.eq(0).all()


def test_heads_are_normalised_as_the_decoder_does():
    case = Case(1, 2, 32, torch.float32, normed=True)
    norm = RMSNorm(32, case.eps, torch.float32, DEVICE, Impl.TORCH).requires_grad_(False)
    norm.weight.copy_(case.norms[1])
    case.together()
    key = Rotary.rotate(norm(case.qkv.view(len(LENGTHS), -1, 32)[:, 2:3]), case.angles)
    real = case.slots >= 0
    written = case.ours.kv[0].flatten(0, 1)[case.slots[real], 0]
    torch.testing.assert_close(written, key[real, 0])
