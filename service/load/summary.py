"""What a run measured, in one record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.load.objectives import good

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.load.objectives import Objective
    from service.load.outcome import Outcome

_PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One load on one server. Latencies are of the requests that succeeded.

    Attributes:
        load: "poisson", "constant", "trace" or "closed".
        rate: requests a second that were due, of an open loop.
        users: of a closed loop.
        requests, succeeded: how many.
        errors: number by kind.
        seconds: from the first request that was due to the end of the last.
        prompt_tokens, output_tokens: of the requests that succeeded.
        requests_per_s, output_tokens_per_s, total_tokens_per_s: of those, over `seconds`.
        good: requests that succeeded and met every objective.
        goodput_per_s: those over `seconds`.
        ttft, itl, tpot, e2e: None where no request has any. From when a request was due.
        late_ms_p99: by how much the client itself sent too late, in milliseconds; it is part of
            the latencies, and where it is not small against them one client is not enough.
        density, coverage: means over the answers that report them.
        fallbacks: tokens by reason, over all answers.
    """

    load: str
    rate: float | None
    users: int | None
    requests: int
    succeeded: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    good: int
    goodput_per_s: float
    ttft: Latency | None
    itl: Latency | None
    tpot: Latency | None
    e2e: Latency | None
    late_ms_p99: float
    density: float | None
    coverage: float | None
    fallbacks: dict[str, int]


def latency(values: Sequence[float]) -> Latency | None:
    """Mean and percentiles, interpolated; None of nothing."""
    if not values:
        return None
    return Latency(float(np.mean(values)), *np.percentile(values, _PERCENTS).tolist())


def summarise(
    outcomes: Sequence[Outcome],
    objectives: Sequence[Objective],
    *,
    load: str,
    rate: float | None = None,
    users: int | None = None,
) -> Summary:
    """A run's record; at least one outcome."""
    done = [one for one in outcomes if one.error is None]
    start = min(one.due for one in outcomes)
    seconds = max(max(one.ended for one in outcomes) - start, 1e-9)
    prompt, output = sum(o.prompt_tokens for o in done), sum(o.output_tokens for o in done)
    met = sum(good(one, objectives) for one in outcomes)
    reports = [one.sparsity for one in done if one.sparsity]
    fallbacks: Counter[str] = Counter()
    for report in reports:
        fallbacks.update(report.get("fallbacks") or {})
    return Summary(
        load=load,
        rate=rate,
        users=users,
        requests=len(outcomes),
        succeeded=len(done),
        errors=dict(Counter(o.error for o in outcomes if o.error is not None).most_common()),
        seconds=seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=output / seconds,
        total_tokens_per_s=(prompt + output) / seconds,
        good=met,
        goodput_per_s=met / seconds,
        ttft=latency([one.ttft for one in done if one.ttft is not None]),
        itl=latency([gap for one in done for gap in one.gaps]),
        tpot=latency([one.tpot for one in done if one.tpot is not None]),
        e2e=latency([one.e2e for one in done if one.e2e is not None]),
        late_ms_p99=float(np.percentile([o.sent - o.due for o in outcomes], 99)) * 1e3,
        density=_mean([r["density"] for r in reports if r.get("density") is not None]),
        coverage=_mean([r["coverage"] for r in reports if r.get("coverage") is not None]),
        fallbacks=dict(fallbacks),
    )


def first_said(outcomes: Sequence[Outcome], kind: str) -> str:
    """What the first error of a kind that says anything says; empty: none does."""
    return next((one.detail for one in outcomes if one.error == kind and one.detail), "")


def table(records: Sequence[Summary]) -> str:
    """The records as text, a line each, and the errors below; latencies in milliseconds."""
    heads = ("TTFT", "ITL", "TPOT", "E2E")
    lines = [
        f"{'load':<16} {'requests':>9} {'req/s':>7} {'tok/s':>8} {'good':>6} "
        + " ".join(f"{head + ' p50/p99 ms':>19}" for head in heads)
        + f" {'density':>8} {'coverage':>8}"
    ]
    for record in records:
        ok = f"{record.succeeded}/{record.requests}"
        cells = (record.ttft, record.itl, record.tpot, record.e2e)
        lines.append(
            f"{label(record):<16} {ok:>9} {record.requests_per_s:>7.2f} "
            f"{record.output_tokens_per_s:>8.1f} {record.good / record.requests:>6.1%} "
            + " ".join(f"{_pair(cell):>19}" for cell in cells)
            + f" {_share(record.density):>8} {_share(record.coverage):>8}"
        )
    for record in records:
        errors = ", ".join(f"{count} x {kind}" for kind, count in record.errors.items())
        if errors:
            lines.append(f"{label(record)}: {errors}")
    return "\n".join(lines)


def label(record: Summary) -> str:
    """A short name of a record's load."""
    if record.users is not None:
        return f"{record.users} users"
    return record.load if record.rate is None else f"{record.load} {record.rate:g}/s"


def _pair(cell: Latency | None) -> str:
    return "-" if cell is None else f"{cell.p50 * 1e3:.1f}/{cell.p99 * 1e3:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
