"""A load test as one page of HTML that needs nothing else."""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any

from service.load import plots
from service.load.summary import first_said, label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.load.plots import Runs
    from service.load.summary import Latency, Summary

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { vertical-align: bottom; }
.scroll { overflow-x: auto; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; color: inherit; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); border-radius: 6px; }
.late { border-left: 4px solid #d6577d; padding-left: .7rem; }
"""
_LATE = 0.1
"""Share of the median time to first token from which the client's own lateness is pointed out."""


def page(head: dict[str, Any], runs: Runs) -> str:
    """The page.

    Args:
        head: the results file's envelope.
        runs: records, and the outcomes that each is made of.
    """
    records = [record for record, _ in runs]
    parts = [
        "<h1>Load test</h1>",
        f"<p>{_text(head['settings'].get('url', ''))}, model "
        f"{_text(head['settings'].get('model', ''))}, {_text(head['date'])}</p>",
        _throughput(records),
        *_warnings(records),
        "<h2>Latency, seconds</h2>",
        _latencies(records),
        f"<figure>{plots.latencies(runs)}</figure>",
    ]
    if len(records) > 1:
        parts += ["<h2>By load</h2>", f"<figure>{plots.loads(records)}</figure>"]
    parts += ["<h2>Over time</h2>", f"<figure>{plots.timeline(runs)}</figure>"]
    if any(record.errors for record in records):
        parts += ["<h2>Errors</h2>", _errors(runs)]
    parts += ["<h2>How it was made</h2>", f"<pre>{_text(json.dumps(head, indent=1))}</pre>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Load test</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _throughput(records: Sequence[Summary]) -> str:
    heads = ["load", "succeeded", "requests/s", "output tokens/s", "all tokens/s", "good"]
    heads += ["goodput, requests/s", "density", "coverage", "client late, p99 ms"]
    rows = [
        [
            label(one),
            f"{one.succeeded} of {one.requests}",
            f"{one.requests_per_s:.2f}",
            f"{one.output_tokens_per_s:.1f}",
            f"{one.total_tokens_per_s:.1f}",
            f"{one.good / one.requests:.1%}",
            f"{one.goodput_per_s:.2f}",
            "" if one.density is None else f"{one.density:.1%}",
            "" if one.coverage is None else f"{one.coverage:.3f}",
            f"{one.late_ms_p99:.1f}",
        ]
        for one in records
    ]
    return _table(heads, rows)


def _latencies(records: Sequence[Summary]) -> str:
    heads = ["load", "", "mean", "p50", "p90", "p95", "p99"]
    names = {
        "ttft": "time to first token",
        "itl": "between tokens",
        "tpot": "a token behind the first",
        "e2e": "end to end",
    }
    rows = []
    for record in records:
        for measure, name in names.items():
            cell: Latency | None = getattr(record, measure)
            if cell is not None:
                values = (cell.mean, cell.p50, cell.p90, cell.p95, cell.p99)
                rows.append([label(record), name, *(f"{value:.4f}" for value in values)])
    return _table(heads, rows)


def _errors(runs: Runs) -> str:
    rows = []
    for record, outcomes in runs:
        for kind, count in record.errors.items():
            rows.append([label(record), kind, str(count), first_said(outcomes, kind)])
    return _table(["load", "kind", "requests", "the first says"], rows)


def _warnings(records: Sequence[Summary]) -> list[str]:
    return [
        f'<p class="late">{_text(label(one))}: the client itself was late by {one.late_ms_p99:.0f} '
        "ms (p99), and the latencies hold that. Give it a machine of its own, or several.</p>"
        for one in records
        if one.ttft is not None and one.late_ms_p99 / 1e3 > _LATE * one.ttft.p50
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(one)}</th>" for one in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
