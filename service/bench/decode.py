"""`saccade bench decode`: one decode step's attention, dynamic against dense, in one run."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels import dynamic
from kernels.attention import Impl, dense_attention, selected_attention
from kernels.cache import LayerCache, Rows, Segment
from kernels.page import PAGE
from kernels.policy import Dynamic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention layer."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class Record:
    """Medians of one context, microseconds a step."""

    context: int  # keys in the cache
    keys: int  # keys kept a KV head
    dynamic_us: float  # scoring, selection and attention
    dense_us: float  # dense attention over the paged cache
    sdpa_us: float  # torch's attention over contiguous keys
    ratio: float  # dense over dynamic, median of the paired ratios
    dense_over_sdpa: float  # likewise


def measure(
    contexts: Sequence[int],
    *,
    keys: int,
    device: str,
    dtype: torch.dtype,
    shape: Shape,
    repeats: int,
) -> list[Record]:
    """Time the three at each context, turn by turn, so that the machine's mood hits all alike."""
    records = []
    with torch.inference_mode(), tqdm(total=len(contexts) * repeats, unit="turn") as progress:
        for context in contexts:
            ways = _ways(context, keys, torch.device(device), dtype, shape)
            for way in ways:
                way()
            turns = []
            for _ in range(repeats):
                turns.append([_seconds(way, device) * 1e6 for way in ways])
                progress.update()
            fast, dense, sdpa = (statistics.median(column) for column in zip(*turns, strict=True))
            records.append(
                Record(
                    context=context,
                    keys=keys,
                    dynamic_us=fast,
                    dense_us=dense,
                    sdpa_us=sdpa,
                    ratio=statistics.median(turn[1] / turn[0] for turn in turns),
                    dense_over_sdpa=statistics.median(turn[1] / turn[2] for turn in turns),
                )
            )
    return records


def table(records: Sequence[Record]) -> str:
    """The records as text, with the growth of the times from the first context to the last."""
    lines = [
        f"{'context':>9} {'keys':>6} {'dynamic':>11} {'dense':>11} {'SDPA':>11} "
        f"{'dense/dynamic':>14} {'dense/SDPA':>11}"
    ]
    lines += [
        f"{r.context:>9} {r.keys:>6} {r.dynamic_us:>8.0f} us {r.dense_us:>8.0f} us "
        f"{r.sdpa_us:>8.0f} us {r.ratio:>14.2f} {r.dense_over_sdpa:>11.2f}"
        for r in records
    ]
    if len(records) > 1:
        first, last = records[0], records[-1]
        lines.append(
            f"time at {last.context} over time at {first.context}: "
            f"dynamic {last.dynamic_us / first.dynamic_us:.2f}, "
            f"dense {last.dense_us / first.dense_us:.2f}"
        )
    return "\n".join(lines)


def as_json(records: Sequence[Record]) -> list[dict[str, float]]:
    """The records as plain values."""
    return [asdict(record) for record in records]


def _ways(
    context: int, keys: int, device: torch.device, dtype: torch.dtype, shape: Shape
) -> list[Callable[[], object]]:
    """Dynamic, dense and SDPA over the same random keys."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device).to(dtype)

    pages = -(-context // PAGE)
    cache = LayerCache.allocate(pages, shape.kv_heads, shape.head_dim, dtype, device)
    cache.kv.copy_(noise(*cache.kv.shape))
    cache.code(torch.arange(context // PAGE, device=device))
    table = list(range(pages))
    rows = Rows(
        torch.tensor([table], device=device),
        torch.tensor([context], device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    segment = Segment.of(table, context - 1, 1, device)
    query = noise(1, shape.heads, shape.head_dim)
    flat = cache.kv.view(shape.kv_heads, -1, 2, shape.head_dim)[:, :context]
    contiguous = flat.permute(2, 0, 1, 3).contiguous()  # [2, kv_heads, context, head_dim]
    group = query.view(1, shape.kv_heads, -1, shape.head_dim)
    scale = shape.head_dim**-0.5
    policy = Dynamic(coverage=1.0, min_keys=keys, max_keys=keys)
    impl = Impl.of(device, dtype)

    def selected() -> tuple[Tensor, Tensor]:
        choice = dynamic.select(query, cache, rows, policy, scale, impl=impl)
        output, lse, own = selected_attention(query, cache, rows, choice.selection, scale, impl)
        return output, choice.coverage(lse, own)

    return [
        selected,
        lambda: dense_attention(query, cache, segment, scale),
        lambda: F.scaled_dot_product_attention(group, contiguous[:1], contiguous[1:], scale=scale),
    ]


def _seconds(way: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start
