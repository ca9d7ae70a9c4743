"""What the tests and the soak run need of Prometheus and of the dashboards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
UNPACKED = ROOT / "build" / "prometheus" / "usr" / "bin"
"""Where `make build/prometheus` puts Debian's package."""


def program(name):
    """Path of `prometheus` or `promtool`, or None."""
    return shutil.which(name) or shutil.which(name, path=str(UNPACKED))


def dashboards():
    """Dashboards by file name."""
    files = sorted((GRAFANA / "dashboards").glob("*.json"))
    return {file.name: json.loads(file.read_text()) for file in files}


def panels(dashboard):
    """All panels that show something, those in rows included."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def filled_in(expression, interval="1m"):
    """An expression as Grafana sends it, with all models chosen."""
    text = expression.replace("$__rate_interval", interval).replace("$model", ".*")
    left = re.search(r"\$\w+|\$\{", text)
    assert left is None, f"{expression} has a variable that no dashboard has"
    return text


def expressions():
    """(dashboard, panel, expression) of every target."""
    return [
        (file, panel["title"], target["expr"])
        for file, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def ask(prometheus, path, **parameters):
    """What Prometheus's API answers; an expression that it does not take is the end."""
    answer = httpx.get(f"{prometheus}/api/v1/{path}", params=parameters, timeout=60)
    if answer.status_code != 200:
        raise SystemExit(f"Prometheus answers {answer.status_code} to {parameters}: {answer.text}")
    return answer.json()["data"]


def targets_down(prometheus):
    """Sentences on targets that are not scraped, or that there is none."""
    targets = ask(prometheus, "targets")["activeTargets"]
    return [
        f"{one['scrapeUrl']} is not scraped: {one['lastError']}"
        for one in targets
        if one["health"] != "up"
    ] or ([] if targets else ["Prometheus has no target"])


def rules_not_loaded(prometheus):
    """Sentences on rules of the repository that are not loaded, or do not evaluate."""
    loaded = [rule for group in ask(prometheus, "rules")["groups"] for rule in group["rules"]]
    wanted = [
        rule
        for file in (PROMETHEUS / "rules").glob("*.yml")
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]
    found = [
        f"the rule {rule['name']} is {rule['health']}: {rule.get('lastError')}"
        for rule in loaded
        if rule["health"] != "ok"
    ]
    if len(loaded) != len(wanted):
        found.append(f"{len(loaded)} rules are loaded instead of {len(wanted)}")
    return found
