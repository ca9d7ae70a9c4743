"""Dense decode in Triton: in one part or in several, the same attention."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.cache import LayerCache, Rows
from kernels.gpu import attend
from kernels.gpu.attend import dense_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not round to bfloat16 as a GPU does.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 0.2
ALONE, SEVERAL = 1 << 20, 1


class Case:
    """Sequences of one query row each or more, and what is true of them."""

    def __init__(self, paged, lengths, kv_heads, group, head_dim, dtype=torch.float32, queries=1):
        case = paged(lengths, kv_heads, head_dim, dtype, queries=queries)
        lengths = case.rows.lengths
        starts = torch.arange(len(lengths)) * 5 % lengths
        self.query = case.query(group).to(DEVICE)
        self.cache = LayerCache(*(part.to(DEVICE) for part in case.cache.parts))
        self.rows = Rows(*(x.to(DEVICE) for x in (case.rows.block_tables, lengths, starts)))
        given = Rows(case.rows.block_tables, lengths, starts)
        self.exact = reference.dense_decode(self.query.cpu(), case.cache, given, SCALE)

    def run(self):
        return dense_decode(self.query, self.cache, self.rows, SCALE)

    def check(self, found):
        output, lse = found
        tolerance = TOLERANCE[self.query.dtype]
        assert output.dtype == self.query.dtype and output.is_contiguous()
        assert lse.dtype == torch.float32
        exact, exact_lse = (one.float().to(DEVICE) for one in self.exact)
        torch.testing.assert_close(output.float(), exact, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, exact_lse, atol=tolerance, rtol=tolerance)


SHAPES = [(1, 4, 128, 1), (2, 3, 80, 1), (3, 1, 24, 1), (2, 2, 16, 9), (1, 7, 96, 5)]
"""KV heads, group, head dimension, queries of a sequence."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim", "queries"), SHAPES)
def test_in_one_part_or_several(paged, monkeypatch, kv_heads, group, head_dim, queries, dtype):
    case = Case(paged, [9, 65, 390], kv_heads, group, head_dim, dtype, queries)
    for alone in (ALONE, SEVERAL):
        monkeypatch.setattr(attend, "ALONE", alone)
        case.check(case.run())


@pytest.mark.parametrize("run_bytes", [16 * 64, 32 * 64, 64 * 64])
def test_in_parts_of_any_size(paged, monkeypatch, run_bytes):
    case = Case(paged, [1000], 1, 2, 16)
    monkeypatch.setattr(attend, "ALONE", SEVERAL)
    monkeypatch.setattr(attend, "RUN_BYTES", run_bytes)
    case.check(case.run())


def test_a_table_that_is_mostly_empty_leaves_empty_parts(paged, monkeypatch):
    case = Case(paged, [3, 1, 900], 2, 2, 32)
    monkeypatch.setattr(attend, "ALONE", SEVERAL)
    case.rows.lengths[1] = 0  # padding sees no key
    case.rows.starts.zero_()
    only = reference.dense_decode(
        case.query.cpu(),
        LayerCache(*(part.cpu() for part in case.cache.parts)),
        Rows(case.rows.block_tables.cpu(), case.rows.lengths.cpu(), case.rows.starts.cpu()),
        SCALE,
    )
    case.exact = only
    case.check(case.run())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("alone", [ALONE, SEVERAL])
def test_a_row_that_is_not_finite_harms_no_other(paged, monkeypatch, alone, bad):
    case = Case(paged, [300, 200, 400], 2, 2, 32)
    monkeypatch.setattr(attend, "ALONE", alone)
    before = case.run()
    case.query[1, 0, 3] = bad
    after = case.run()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    assert not after[0][1, 0].isfinite().all()
