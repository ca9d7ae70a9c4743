"""`saccade bench serve` from end to end against the real service, and its report."""

from __future__ import annotations

import html.parser
import json
import re

import pytest
from typer.testing import CliRunner

from service.commands.app import app
from service.errors import ConfigError
from service.load.outcome import Outcome
from service.load.report import page
from service.load.summary import summarise, table


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)], catch_exceptions=False)


def test_it_measures_the_service_and_writes_it_down(server, tmp_path):
    files = {name: tmp_path / f"load.{name}" for name in ("json", "html", "jsonl")}
    result = bench(
        *("--url", server, "--rate", "20,40", "--requests", 5, "--warmup", 1),
        *("--prompt", "uniform:20,60", "--output", "6", "--token-ids", "0-250"),
        *("--sparsity", '{"policy": "fixed", "pattern": "window:64"}'),
        *("--slo", "ttft:60", "--slo", "itl:60", "--json", files["json"]),
        *("--html", files["html"], "--details", files["jsonl"], "--commit", "abc"),
    )
    assert result.exit_code == 0, result.output
    assert "poisson 20/s" in result.output
    saved = json.loads(files["json"].read_text())
    assert saved["commit"] == "abc"
    assert saved["settings"]["model"] == "tiny"
    assert [record["rate"] for record in saved["records"]] == [20, 40]
    for record in saved["records"]:
        assert record["succeeded"] == record["good"] == 5
        assert record["output_tokens"] == 30
        assert 0 < record["ttft"]["p50"] <= record["e2e"]["p50"]
        assert 0 < record["density"] <= 1
        assert record["fallbacks"]["requested"] > 0
    rows = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert [row["run"] for row in rows] == [0] * 5 + [1] * 5
    assert all(len(row["tokens_at"]) == 6 for row in rows)
    check_page(files["html"].read_text(), plots=3)


def test_errors_are_counted_and_shown(server, tmp_path):
    file = tmp_path / "load.html"
    result = bench(
        *("--url", server, "--users", 2, "--requests", 4, "--prompt", 20, "--warmup", 0),
        *("--token-ids", "90000-90001", "--html", file),
    )
    assert result.exit_code == 0
    assert "4 x http 400" in result.output
    assert result.output.count("token ids must lie in") == 1
    assert "token ids must lie in" in file.read_text()


def test_a_chat_over_a_closed_loop(server):
    result = bench("--url", f"{server}/v1", "--endpoint", "chat", "--prompt", 9, "--output", 3,
                   "--users", 2, "--requests", 3)  # fmt: skip
    assert "2 users" in result.output
    assert "3/3" in result.output


def test_a_trace_is_played(server, tmp_path):
    trace = tmp_path / "trace.jsonl"
    row = '{"timestamp": %d, "input_length": 30, "output_length": 2, "hash_ids": [1]}\n'
    trace.write_text("".join(row % (20 * number) for number in range(4)))
    result = bench("--url", server, "--trace", trace, "--token-ids", "0-250")
    assert "4/4" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "1", "--users", "1"], "one of --rate, --users and --trace"),
        (["--users", "1.5"], "whole"),
        (["--endpoint", "embeddings"], "--endpoint"),
        (["--arrivals", "never", "--rate", "1"], "never"),
        (["--rate", "0.001", "--duration", "0.001"], "no request is due"),
        (["--json", "/nowhere/x.json"], "/nowhere"),
        (["--url", "http://127.0.0.1:9"], "no server answers"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        bench(*arguments)


def test_the_key_is_not_written_down(server, tmp_path, monkeypatch):
    file = tmp_path / "load.json"
    arguments = ["--url", server, "--api-key", "secret", "--requests", "1", "--prompt", "9",
                 "--output", "1", "--token-ids", "0-250", "--json", str(file)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["saccade", "bench", "serve", *arguments])
    assert bench(*arguments).exit_code == 0
    assert "secret" not in file.read_text()
    assert "--api-key ..." in file.read_text()


# -- the report of made-up outcomes -----------------------------------------------------------


def outcome(due, error=None, tokens=4):
    times = [due + 0.1 * (number + 1) for number in range(tokens)]
    return Outcome(due, due, 10, tokens, times, due + 1, error, "<b>boom</b>" if error else "")


HEAD = {"date": "2026-01-01", "settings": {"url": "http://x", "model": "<m>"}}


def test_a_summary_leaves_failures_out_of_the_latencies():
    outcomes = [outcome(0.0), outcome(1.0), outcome(2.0, "timeout", 2), outcome(3.0, "http 503", 0)]
    got = summarise(outcomes, [], load="poisson", rate=1.0)
    assert got.errors == {"timeout": 1, "http 503": 1}
    assert (got.requests, got.succeeded, got.good) == (4, 2, 2)
    assert got.seconds == pytest.approx(4.0)
    assert got.requests_per_s == pytest.approx(0.5)
    assert got.output_tokens_per_s == pytest.approx(2.0)
    assert got.total_tokens_per_s == pytest.approx(7.0)
    assert got.ttft.p99 == pytest.approx(0.1)
    assert got.e2e.mean == pytest.approx(0.4)
    assert got.itl.p50 == pytest.approx(0.1)
    assert got.tpot.p50 == pytest.approx(0.1)


def test_a_report_of_nothing_but_failures_renders():
    outcomes = [outcome(0.0, "connection", 0)]
    got = summarise(outcomes, [], load="closed", users=1)
    assert got.ttft is None
    assert "1 x connection" in table([got])
    text = page(HEAD, [(got, outcomes)])
    check_page(text, plots=2)
    assert "<b>boom" not in text
    assert "&lt;b&gt;boom" in text


def test_a_late_client_is_pointed_out():
    late = outcome(0.0)
    late.sent = 0.09
    assert "late by 90 ms" in page(HEAD, [(summarise([late], [], load="trace"), [late])])


def check_page(text, plots):
    """It needs nothing from elsewhere, its ids are unique, and its tags are balanced."""
    assert text.count("<svg") == plots
    assert "prefers" in text or "color-scheme: light dark" in text
    assert "currentColor" in text
    for loaded in ("<script", "<link", "<img", "@import", "url(http"):
        assert loaded not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text))
    assert used <= set(ids)

    class Balance(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(text)
    assert balance.open == []
