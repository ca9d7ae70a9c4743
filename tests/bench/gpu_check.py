"""Triton's kernels on a GPU: the same as torch's operations, and how long each part takes.

python3 tests/bench/gpu_check.py [--profile]   # compares, then times; 1 where they differ
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels import dynamic, judge, torch_backend  # noqa: E402  (the script also runs uninstalled)
from kernels.attention import Impl, dense_decode, selected_attention  # noqa: E402
from kernels.cache import LayerCache, Rows  # noqa: E402
from kernels.page import PAGE  # noqa: E402
from kernels.policy import Dynamic  # noqa: E402
from kernels.timing import Phases  # noqa: E402

if TYPE_CHECKING:
    from kernels.selection import Selection

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
    """Whether Triton selects nearly what torch does in float32, twice the same, and attends so."""
    query, cache, rows = case.build()
    wide = replace(cache, kv=cache.kv.float(), key_mean=cache.key_mean.float())
    exact = query.float()
    expected = dynamic.select(exact, wide, rows, policy, SCALE)
    actual, again = (
        dynamic.select(query, cache, rows, policy, SCALE, impl=Impl.TRITON) for _ in range(2)
    )
    actual.selection.validate(rows.lengths)
    good = same(actual, again)
    width = int(rows.lengths.max())
    one, two = (by_key(choice.selection, width) for choice in (expected, actual))
    both = (one >= 0) & (two >= 0)
    overlap = float(both.sum() / ((one >= 0) | (two >= 0)).sum())
    apart = (one - two)[both].abs()  # logs of weights
    chosen = actual.selection
    wanted = torch_backend.selected_attention(exact, wide, rows, chosen, SCALE)
    found = selected_attention(query, cache, rows, chosen, SCALE, Impl.TRITON)
    errors = [float((x.float() - y).abs().max()) for x, y in zip(found, wanted, strict=True)]
    _, lse, own = torch_backend.selected_attention(exact, wide, rows, expected.selection, SCALE)
    covers = expected.coverage(lse, own), actual.coverage(*found[1:])
    true = [
        judge.true_coverage(q, c, rows, chosen, found[2], SCALE, impl)
        for q, c, impl in ((exact, wide, Impl.TORCH), (query, cache, Impl.TRITON))
    ]
    numbers = {
        "keys": float(chosen.counts.float().mean()),
        "keys differ": float((chosen.counts - expected.selection.counts).abs().float().mean()),
        "overlap": overlap,
        "log weights differ": float(apart.mean()),
        "at most": float(apart.max()),
        "missing differs": float((actual.missing - expected.missing).abs().max()),
        "unit": float((actual.unit - expected.unit).abs().max()),
        "output": errors[0],
        "lse": errors[1],
        "own": errors[2],
        "coverage": float((covers[0] - covers[1]).abs().max()),
        "true coverage": float((true[0] - true[1]).abs().max()),
    }
    bounds = {
        "keys differ": 0.01 * numbers["keys"], "log weights differ": 0.02, "missing differs": 0.02,
        "unit": 0.05, "output": 0.03, "lse": 0.02, "own": 0.02, "coverage": 0.02,
        "true coverage": 0.01,
    }  # fmt: skip
    wrong = [name for name, bound in bounds.items() if not numbers[name] <= bound]
    wrong += [] if overlap > 0.98 else ["overlap"]
    wrong += [] if good else ["repeated"]
    told = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
    estimate = float((covers[1] - true[1]).abs().mean())
    print(
        f"{case} {policy}: {told}; estimate off {estimate:.4f} "
        f"{'WRONG: ' + ', '.join(wrong) if wrong else ''}",
        flush=True,
    )
    return not wrong


def same(one: dynamic.Choice, two: dynamic.Choice) -> bool:
    """Whether two choices are equal to the bit."""
    pairs = [(x.selection.indices, x.selection.log_weight, x.missing, x.unit) for x in (one, two)]
    return all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*pairs, strict=True)
    )


def by_key(selection: Selection, width: int) -> torch.Tensor:
    """Log-weights [rows, kv_heads, width] of the selected keys, -1 of the others."""
    weights = selection.log_weight
    weights = selection.indices.new_zeros(1, dtype=torch.float) if weights is None else weights
    weights = weights.float().expand(selection.indices.shape)
    place = torch.where(selection.indices >= 0, selection.indices, width)
    empty = weights.new_full((*place.shape[:2], width + 1), -1.0)
    return empty.scatter_(2, place, weights)[..., :-1]


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
        f"{case} {policy}: dense {dense:.0f} us (bytes at 4.55 TB/s: {floor:.0f}), "
        f"select {select:.0f} (host {host:.0f}; waited for: {parts}), attend {attend:.0f}, "
        f"keys {kept:.0f}",
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
    plain, top = Dynamic(), Dynamic(coverage=1.0, min_keys=512, max_keys=512, sampled=False)
    good = [
        agree(Case(3, 40_000, **model), plain),
        agree(Case(2, 30_000, **model, queries=5), Dynamic(coverage=0.9, min_keys=0, worth=0.5)),
        agree(Case(3, 9_000, **model), Dynamic(coverage=0.8, min_keys=0, max_keys=9000, worth=0.0)),
        agree(Case(3, 9_000, **model), top),
        agree(Case(2, 40_000, **llama), Dynamic(coverage=1.0, min_keys=2048, max_keys=2048)),
        agree(Case(2, 20_000, 2, 7, 64, torch.float16), plain),
        agree(Case(2, 3_000, 2, 4, 96, torch.float32), Dynamic(max_keys=100, min_keys=0)),
        agree(Case(5, 300, **model, queries=7), Dynamic(min_keys=200, max_keys=5000)),
        agree(Case(5, 100, **model), plain),
    ]
    profiled = "--profile" in sys.argv
    for case in (
        Case(160, 65_536, **model),
        Case(8, 65_536, **model, queries=128),
        Case(8, 131_072, **llama),
        Case(1, 131_072, **llama),
        Case(1, 1_048_576, **model),
    ):
        time_parts(case, plain, profiled=profiled)
    time_parts(Case(8, 131_072, **llama), top, profiled=False)
    return int(not all(good))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
