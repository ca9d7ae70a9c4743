"""Prometheus's rules and Grafana's dashboards: promtool checks them, and they name what exists."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import yaml

from service.metrics import Metrics
from service.metrics_totals import WANTED
from tests.deploy.monitoring import (
    GRAFANA,
    PROMETHEUS,
    dashboards,
    expressions,
    filled_in,
    panels,
    program,
)

RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
UNITS = {"short", "s", "percentunit", "reqps", "cps", "ops"}
WIDTH = 24
"""Columns of Grafana's grid."""


@pytest.fixture(scope="session")
def promtool():
    found = program("promtool")
    if found is None:
        said = "promtool is missing, so NO RULE WAS TESTED: run make build/prometheus"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)

    def run(*arguments):
        return subprocess.run(
            [found, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    return run


def rules(kind):
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def succeeds(done):
    assert done.returncode == 0, done.stdout + done.stderr


# -- rules ------------------------------------------------------------------------------------


def test_the_configuration_is_valid(promtool):
    succeeds(promtool("check", "config", PROMETHEUS / "prometheus.yml"))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_alerts_fire_and_clear(promtool, file):
    succeeds(promtool("test", "rules", file))


def test_a_rule_that_is_wrong_fails_its_tests(promtool, tmp_path):
    """The tests above can fail: with another limit the alert is late."""
    for file in RULES:
        (tmp_path / file.name).write_text(file.read_text().replace("> 0.95", "> 0.999"))
    text = next(file for file in TESTS if file.name == "service.yml").read_text()
    changed = tmp_path / "service.yml"
    changed.write_text(text.replace("../rules/", f"{tmp_path}/"))
    done = promtool("test", "rules", changed)
    assert done.returncode != 0
    assert "SaccadeKVCacheFull" in done.stdout + done.stderr


def test_every_alert_is_seen_to_fire_and_to_clear():
    """By window where an alert has several: each is a rule of its own."""
    fired, cleared = set(), set()
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for check in test["promql_expr_test"]:
                labels = dict(re.findall(r'(\w+)="([^"]*)"', check["expr"]))
                name, window = labels["alertname"], labels.get("window", "")
                if check["exp_samples"]:
                    fired.add((name, window, check["eval_time"]))
                else:
                    cleared.add((name, window, check["eval_time"]))

    def minutes(entries, alert):
        return [
            int(time.removesuffix("m")) for name, window, time in entries if (name, window) == alert
        ]

    alerts = {(rule["alert"], rule["labels"].get("window", "")) for rule in rules("alert")}
    assert len(alerts) == len(rules("alert")) == 20
    for alert in alerts:
        times = minutes(fired, alert)
        assert times, f"no test fires {alert}"
        assert max(minutes(cleared, alert), default=-1) > min(times), f"no test clears {alert}"


def test_every_alert_says_what_to_do():
    for rule in rules("alert"):
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 40


# -- series -----------------------------------------------------------------------------------


def known_series():
    families = list(Metrics("m").registry.collect())
    names = {sample.name for family in families for sample in family.samples}
    # Families whose labels are only known later have no sample yet.
    names |= {family.name for family in families} | {WANTED}
    return names | {rule["record"] for rule in rules("record")} | {"up"}


def named_in(expression):
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:model:)?saccade_\w+(?::\w+)*", bare))


def test_rules_and_panels_name_series_that_exist():
    known = known_series()
    used = [rule["expr"] for rule in rules("expr")] + [expr for _, _, expr in expressions()]
    for expression in used:
        assert named_in(expression) <= known, expression


def test_every_recorded_series_is_used():
    alerts = " ".join(rule["expr"] for rule in rules("expr"))
    shown = " ".join(expr for _, _, expr in expressions())
    used = named_in(alerts) | named_in(shown)
    assert {rule["record"] for rule in rules("record")} <= used


def test_limits_are_buckets_of_their_histograms():
    buckets = {}
    for family in Metrics("m").registry.collect():
        for sample in family.samples:
            if "le" in sample.labels:
                buckets.setdefault(sample.name, set()).add(sample.labels["le"])
    pattern = r'(saccade_\w+_bucket)\{[^}]*le="([^"]+)"'
    found = [one for rule in rules("record") for one in re.findall(pattern, rule["expr"])]
    assert len(found) >= 13
    for name, limit in found:
        assert limit in buckets[name]


# -- dashboards -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", dashboards())
def test_a_dashboard_is_well_formed(file):
    board = dashboards()[file]
    assert board["title"].startswith("Saccade: ")
    assert re.fullmatch(r"[a-z-]{1,40}", board["uid"])
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "model"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["model"]["datasource"] == source
    everything = [
        *board["panels"],
        *(one for row in board["panels"] for one in row.get("panels", [])),
    ]
    ids = [panel["id"] for panel in everything]
    assert len(ids) == len(set(ids))
    titles = [(panel["type"], panel["title"]) for panel in everything]
    assert len(titles) == len(set(titles))
    taken = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(board):
        assert panel["type"] in ("timeseries", "stat", "heatmap")
        assert panel["datasource"] == source
        assert panel["targets"]
        unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]
        assert unit in UNITS
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == source
            filled_in(target["expr"])
            assert ("$model" in target["expr"]) or "up{" in target["expr"]


def test_uids_differ_and_the_provisioned_source_exists():
    uids = [board["uid"] for board in dashboards().values()]
    assert sorted(uids) == ["saccade-engine", "saccade-service", "saccade-sparsity"]
    provisioning = GRAFANA / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    (source,) = sources["datasources"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    providers = yaml.safe_load((provisioning / "dashboards" / "saccade.yaml").read_text())
    assert providers["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


def test_every_expression_parses(promtool, tmp_path):
    """As rules, since promtool has no command for expressions."""
    file = tmp_path / "panels.yml"
    listed = [
        {"record": f"panel:{number}", "expr": filled_in(expr)}
        for number, (_, _, expr) in enumerate(expressions())
    ]
    assert len(listed) > 60
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": listed}]}))
    succeeds(promtool("check", "rules", file))
    listed[0]["expr"] = "sum(("
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": listed}]}))
    assert promtool("check", "rules", file).returncode != 0
