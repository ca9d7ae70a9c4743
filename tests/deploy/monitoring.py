"""What the tests and the soak run need of Prometheus and of the dashboards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

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
