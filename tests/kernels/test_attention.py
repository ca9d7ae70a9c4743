"""Selected and dense attention against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import torch_dense
from kernels.attention import Impl, dense_attention, dense_decode, selected_attention
from kernels.cache import LayerCache, Rows, Segment
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.reference import masked_attention
from kernels.selection import Selection

SHAPES = [(1, 1), (2, 3), (3, 4), (1, 8), (5, 2)]  # (kv_heads, group)
LENGTHS = [1, 63, 64, 65, 200, 256]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("few_programs")


def backends(dtype, shape):
    """What takes a dtype.

    Numba knows those of a CPU alone; Triton's interpreter has no products in bfloat16, and in
    float16 goes the same ways for every shape.
    """
    yield from (Impl.REFERENCE, Impl.TORCH)
    if dtype in (torch.float32, torch.bfloat16):
        yield Impl.NUMBA
    if torch.cuda.is_available():
        triton = dtype is not torch.float64
    else:
        triton = dtype is torch.float32 or (dtype is torch.float16 and shape == SHAPES[1])
    if triton:
        yield Impl.TRITON


def in_low_precision(query, keys, values, mask, scale, log_weight=None):
    """The same computation by torch in the query's own precision: what rounding alone costs.

    Both as written down and as torch's fused kernel rounds it, whose exponential is coarser on some
    processors.
    """
    scores = torch.einsum("rhd,rhkd->rhk", query, keys) * scale
    bias = torch.zeros_like(scores) if log_weight is None else log_weight.to(scores.dtype)
    bias = bias.masked_fill(~mask, -torch.inf)
    weights = (scores + bias).softmax(-1).nan_to_num(0.0)
    written = torch.einsum("rhk,rhkd->rhd", weights, values)
    fused = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=bias[:, :, None], scale=scale
    )
    return written, fused[:, :, 0].nan_to_num(0.0)


def assert_as_exact(actual, plain, exact, impl):
    """At most twice the error that the same sums make in low precision; see CONTRIBUTING."""
    allowed = 2 * max((one.double() - exact).abs().max() for one in plain)
    # Over few elements chance alone moves the largest error by two or three last bits.
    allowed = max(allowed, 3 * torch.finfo(actual.dtype).eps * max(exact.abs().max(), 1.0))
    assert torch.isfinite(actual).all(), impl
    assert (actual.double() - exact).abs().max() <= allowed, impl


def full_keys(case, group):
    width = max(k.shape[0] for k in case.keys)
    queries = case.rows.queries
    stacked = []
    for source in (case.keys, case.values):
        out = torch.zeros(len(source), case.kv_heads, width, case.head_dim, dtype=case.dtype)
        for i, x in enumerate(source):
            out[i, :, : x.shape[0]] = x.transpose(0, 1)
        stacked.append(out.repeat_interleave(group, 1).repeat_interleave(queries, 0))
    return stacked


def random_selection(case, density, seed=0, weighted=False):
    generator = torch.Generator().manual_seed(seed)
    rows, width = case.rows.lengths.shape[0], int(case.rows.lengths.max())
    mask = torch.rand(rows, case.kv_heads, width, generator=generator) < density
    mask &= torch.arange(width) < case.rows.lengths[:, None, None]
    positions = torch.arange(width).expand(rows, case.kv_heads, width)
    weights = None
    if weighted:
        weights = torch.rand(mask.shape, generator=generator, dtype=torch.float64) * 3
        weights = weights.to(torch.float64 if case.dtype is torch.float64 else torch.float32)
    return Selection.from_mask(mask, positions, weights), mask, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("density", "weighted"), [(0.0, False), (0.3, False), (0.3, True), (1.0, False), (1.0, True)]
)
def test_selected_attention_is_a_masked_softmax(paged, dtype, shape, density, weighted):
    kv_heads, group = shape
    case = paged(LENGTHS, kv_heads, 32, dtype, seed=kv_heads, queries=1)
    query = case.query(group)
    selection, mask, weights = random_selection(case, density, weighted=weighted)
    selection.validate(case.rows.lengths)
    keys, values = full_keys(case, group)
    heads_mask = mask.repeat_interleave(group, 1)
    heads_weights = None if weights is None else weights.repeat_interleave(group, 1)
    _, exact_own = masked_attention(query, keys, values, heads_mask, 0.2)
    exact, exact_lse = masked_attention(query, keys, values, heads_mask, 0.2, heads_weights)
    plain = in_low_precision(query, keys, values, heads_mask, 0.2, heads_weights)
    tolerance = 1e-9 if dtype is torch.float64 else 2e-5 if dtype is torch.float32 else 5e-2
    near = {"atol": tolerance, "rtol": tolerance}
    for impl in backends(dtype, shape):
        output, lse, own = selected_attention(query, case.cache, case.rows, selection, 0.2, impl)
        assert_as_exact(output, plain, exact, impl)
        torch.testing.assert_close(lse.double(), exact_lse, **near)
        torch.testing.assert_close(own.double(), exact_own, **near)


@pytest.mark.parametrize("impl", list(Impl))
def test_a_row_without_keys_gives_zero_and_minus_infinity(paged, impl):
    case = paged([100, 7], 2, 16)
    mask = torch.zeros(2, 2, 7, dtype=torch.bool)
    mask[1, 0, 3] = True  # one key in one head of one row, nothing elsewhere
    selection = Selection.from_mask(mask, torch.arange(7).expand(2, 2, 7))
    query = case.query(3)
    output, lse, own = selected_attention(query, case.cache, case.rows, selection, 1.0, impl)
    assert (output[0] == 0).all() and (output[1, 3:] == 0).all()
    for one in (lse, own):
        assert torch.isneginf(one[0]).all() and torch.isneginf(one[1, 3:]).all()
    torch.testing.assert_close(output[1, :3], case.values[1][3, :1].expand(3, -1))


SEGMENTS = [  # where it starts, tokens, window
    (0, 1, None),
    (0, 130, None),
    (0, 130, 50),
    (0, 130, 4000),  # wider than all there is
    (63, 2, None),
    (63, 2, 50),
    (200, 1, None),
    (200, 1, 50),
    (700, 37, None),
    (700, 37, 50),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("start", "tokens", "window"), SEGMENTS)
def test_dense_attention_is_a_causal_softmax(paged, dtype, shape, start, tokens, window):
    kv_heads, group = shape
    total = start + tokens
    case = paged([total], kv_heads, 16, dtype, seed=start)
    query = case.query(group, rows=tokens)
    segment = Segment.of(case.tables[0], start, tokens, query.device)
    keys, values = full_keys(case, group)
    position = torch.arange(start, total)[:, None]
    mask = torch.arange(total) <= position
    if window:
        mask &= position - torch.arange(total) < window
    mask = mask[:, None].expand(-1, kv_heads * group, -1)
    keys, values = (x.expand(tokens, -1, -1, -1) for x in (keys, values))
    exact, _ = masked_attention(query, keys, values, mask, 0.25)
    plain = in_low_precision(query, keys, values, mask, 0.25)
    for impl in backends(dtype, shape):
        output = dense_attention(query, case.cache, segment, 0.25, window, impl)
        assert_as_exact(output, plain, exact, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("window", [None, 1500])
def test_dense_attention_gives_the_same_bits_wherever_pages_lie(
    monkeypatch, dtype, falling, window
):
    monkeypatch.setattr(torch_dense, "PIECE", 16 * PAGE)  # several pieces, the last one short
    count, pages = 40, list(range(60))
    orders = [pages, pages[::-1], [*pages[20:37], 3, 7, *pages[40:], 2, 0, 1]]
    generator = torch.Generator().manual_seed(1)
    kv = torch.randn(2, count, PAGE, 2, 32, generator=generator).to(dtype)
    slopes = torch.linspace(0.001, 0.1, 6) if falling else None
    total = count * PAGE - 5
    for tokens in (1, 70):
        query = torch.randn(tokens, 6, 32, generator=generator).to(dtype)
        ends = torch.arange(total - tokens, total) + 1
        results = []
        for order in orders:
            table = order[:count]
            cache = LayerCache.allocate(len(pages), 2, 32, dtype, "cpu").biased(slopes)
            cache.kv[:, table] = kv
            segment = Segment.of(table, total - tokens, tokens, query.device)
            rows = Rows(torch.tensor([table]), ends, torch.zeros_like(ends)).within(window)
            output = dense_attention(query, cache, segment, 0.3, window)
            results.append((output, *dense_decode(query, cache, rows, 0.3)))
        expected = dense_attention(query, cache, segment, 0.3, window, Impl.REFERENCE)
        near = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(output, expected, atol=near, rtol=near)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_shapes_that_do_not_fit_are_refused(paged):
    case = paged([70], 2, 16)
    selection, *_ = random_selection(case, 0.5)
    with pytest.raises(KernelError, match="multiple of 2 heads"):
        selected_attention(torch.zeros(1, 3, 16), case.cache, case.rows, selection, 1.0)
    with pytest.raises(KernelError, match="must agree"):
        selected_attention(case.query(1).half(), case.cache, case.rows, selection, 1.0)
    with pytest.raises(KernelError, match="rows"):
        selected_attention(case.query(1, rows=3), case.cache, case.rows, selection, 1.0)
    segment = Segment.of(case.tables[0], 0, 70, torch.device("cpu"))
    with pytest.raises(KernelError, match="70 tokens"):
        dense_attention(case.query(1, rows=3), case.cache, segment, 1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("queries", [1, 9])
def test_dense_decode_is_a_masked_softmax_over_what_is_seen(paged, shape, queries):
    kv_heads, group = shape
    case = paged([9, 65, 300, 1000], kv_heads, 32, torch.float32, queries=queries)
    rows = case.rows
    starts = torch.arange(len(rows.lengths)) * 7 % rows.lengths
    rows = Rows(rows.block_tables, rows.lengths, starts)
    query = case.query(group)
    keys, values = full_keys(case, group)
    place = torch.arange(keys.shape[2])
    mask = (place >= starts[:, None]) & (place < rows.lengths[:, None])
    mask = mask[:, None].expand(-1, query.shape[1], -1)
    exact, exact_lse = masked_attention(query, keys, values, mask, 0.2)
    plain = in_low_precision(query, keys, values, mask, 0.2)
    for impl in backends(torch.float32, shape):
        output, lse = dense_decode(query, case.cache, rows, 0.2, impl)
        assert_as_exact(output, plain, exact, impl)
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "group", "expected"),
    [
        ("cuda", torch.bfloat16, 128, 4, Impl.TRITON),
        ("cuda:1", torch.float16, 16, 1, Impl.TRITON),
        ("cuda", torch.float32, 256, 32, Impl.TRITON),
        ("cuda", torch.float64, 128, 4, Impl.TORCH),
        ("cuda", torch.bfloat16, 14, 4, Impl.TORCH),
        ("cuda", torch.bfloat16, 130, 4, Impl.TORCH),
        ("cuda", torch.bfloat16, 192, 4, Impl.TORCH),
        ("cuda", torch.bfloat16, 194, 4, Impl.TRITON),
        ("cuda", torch.bfloat16, 258, 4, Impl.TORCH),
        ("cuda", torch.bfloat16, 128, 33, Impl.TORCH),
        ("cpu", torch.bfloat16, 192, 40, Impl.NUMBA),
        ("cpu", torch.float16, 128, 4, Impl.TORCH),
    ],
)
def test_a_backend_is_one_that_takes_the_shape(device, dtype, head_dim, group, expected):
    assert Impl.of(torch.device(device), dtype, head_dim, group) is expected
