"""Triton's kernels on a GPU: the same as torch's operations, and how long each part takes.

python3 tests/bench/gpu_check.py [--profile]   # compares, then times; 1 where they differ
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels import dynamic, judge  # noqa: E402  (the script also runs uninstalled)
from kernels.attention import Impl, dense_decode, selected_attention  # noqa: E402
from kernels.cache import LayerCache, Rows  # noqa: E402
from kernels.page import PAGE  # noqa: E402
from kernels.policy import Dynamic  # noqa: E402
from kernels.timing import Phases  # noqa: E402

SCALE = 128**-0.5


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences of random keys, one decode row each or several."""

    sequences: int
    context: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    queries: int = 1

    def build(self) -> tuple[torch.Tensor, LayerCache, Rows]:
        """Queries that a few keys answer, the cache, and where the rows' keys lie."""
        torch.manual_seed(0)
        pages = -(-self.context // PAGE)
        total = pages * self.sequences
        cache = LayerCache.allocate(total, self.kv_heads, self.head_dim, self.dtype, "cuda")
        for page in range(0, total, 4096):
            part = cache.kv[:, page : page + 4096]
            part.copy_(torch.randn(part.shape, device="cuda"))
        for page in range(0, total, 2048):
            cache.code(torch.arange(page, min(total, page + 2048), device="cuda"))
        table = torch.randperm(total, device="cuda").view(self.sequences, pages)
        ends = self.context - 5 - torch.arange(self.queries - 1, -1, -1, device="cuda")
        ends = ends.repeat(self.sequences)
        rows = Rows(table, ends, torch.zeros_like(ends))
        query = torch.randn(len(ends), self.kv_heads * self.group, self.head_dim, device="cuda")
        return (query * 2).to(self.dtype), cache, rows


def agree(case: Case, policy: Dynamic) -> bool:
    """Whether both backends select nearly the same keys and attend alike."""
    query, cache, rows = case.build()
    found = []
    for impl in (Impl.TORCH, Impl.TRITON):
        choice = dynamic.select(query, cache, rows, policy, SCALE, impl=impl)
        output, lse = selected_attention(query, cache, rows, choice.selection, SCALE, impl)
        coverage = choice.coverage(lse)
        exact = judge.true_coverage(query, cache, rows, choice.selection, lse, SCALE, impl)
        found.append((choice, choice.complete(output, coverage), coverage, exact))
    (one, a, c, e), (two, b, d, f) = found
    two.selection.validate(rows.lengths)
    same = total = 0
    width = int(rows.lengths.max()) + 1
    for first, second in zip(one.selection.indices, two.selection.indices, strict=True):
        masks = [
            torch.zeros(case.kv_heads, width, dtype=torch.bool, device="cuda").scatter_(
                1, x.where(x >= 0, width - 1), True
            )[:, :-1]
            for x in (first, second)
        ]
        same += int((masks[0] & masks[1]).sum())
        total += int((masks[0] | masks[1]).sum())
    error = float((a.float() - b.float()).abs().max())
    drift = float((c - d).abs().max()), float((e - f).abs().max()), float((d - f).abs().mean())
    good = same / total > 0.99 and error < 0.05 and drift[0] < 0.01 and drift[1] < 0.01
    print(
        f"{case}: overlap {same / total:.5f}, output error {error:.4f}, coverage differs "
        f"{drift[0]:.5f}, exact {drift[1]:.5f}, estimate off {drift[2]:.5f} "
        f"{'' if good else 'WRONG'}",
        flush=True,
    )
    return good


def clock(work, repeats: int = 20) -> float:
    """Median microseconds."""
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return sorted(times[3:])[repeats // 2]


def time_parts(case: Case, policy: Dynamic, *, profiled: bool) -> None:
    """Dense and dynamic, eager; and what each phase of a step takes."""
    query, cache, rows = case.build()
    choice = dynamic.select(query, cache, rows, policy, SCALE, impl=Impl.TRITON)
    dense = clock(lambda: dense_decode(query, cache, rows, SCALE, Impl.TRITON))
    attend = clock(
        lambda: selected_attention(query, cache, rows, choice.selection, SCALE, Impl.TRITON)
    )
    select = clock(lambda: dynamic.select(query, cache, rows, policy, SCALE, impl=Impl.TRITON))
    phases = Phases(on=True)
    for _ in range(10):
        dynamic.select(query, cache, rows, policy, SCALE, phases, Impl.TRITON)
    parts = ", ".join(f"{name} {1e5 * seconds:.0f}" for name, seconds in phases.seconds.items())
    kept = float(choice.selection.counts.float().mean())
    floor = 2 * query.itemsize * case.kv_heads * case.head_dim * float(rows.lengths.sum()) / 4.55e6
    host = time.perf_counter()
    dynamic.select(query, cache, rows, policy, SCALE, impl=Impl.TRITON)
    host = 1e6 * (time.perf_counter() - host)
    print(
        f"{case}: dense {dense:.0f} us (bytes at 4.55 TB/s: {floor:.0f}), select {select:.0f} "
        f"(host {host:.0f}; waited for: {parts}), attend {attend:.0f}, keys {kept:.0f}",
        flush=True,
    )

    if not profiled:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            dynamic.select(query, cache, rows, policy, SCALE, impl=Impl.TRITON)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in events[:14]:
        print(f"  {event.self_device_time_total / 5:8.1f} us x{event.count // 5}  {event.key[:70]}")


def main() -> int:
    """Compare, then time."""
    model = {"kv_heads": 2, "group": 2, "head_dim": 128, "dtype": torch.bfloat16}
    llama = {"kv_heads": 8, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
    plain = Dynamic()
    good = [
        agree(Case(3, 40_000, **model), plain),
        agree(Case(2, 30_000, **model, queries=5), Dynamic(coverage=0.9, min_keys=0)),
        agree(Case(3, 9_000, **model), plain),
        agree(Case(2, 40_000, **llama), Dynamic(coverage=1, min_keys=2048, max_keys=2048)),
        agree(Case(2, 20_000, 2, 7, 64, torch.float16), Dynamic(max_keys=1024)),
    ]
    profiled = "--profile" in sys.argv
    for case in (
        Case(160, 65_536, **model),
        Case(8, 65_536, **model, queries=128),
        Case(8, 131_072, **llama),
        Case(1, 131_072, **llama),
    ):
        time_parts(case, plain, profiled=profiled)
    return int(not all(good))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
