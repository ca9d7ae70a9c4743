"""The tables of docs/metrics.md: every series, and what the rules and dashboards do with it."""

from __future__ import annotations

import re

import yaml

from service.metrics import Metrics
from tests.deploy.monitoring import PROMETHEUS, dashboards, panels
from tests.docs.markdown import code, table

BACKENDS = ("triton", "numba", "torch")
"""Of `saccade_attention_backend_info`, whose label is only known when the model is loaded."""
_NAME = re.compile(r"\b(?:model:\w+:\w+|saccade_\w+)")


def series():
    """A row for each family, and the buckets of the histograms below."""
    metrics = Metrics("m")
    for backend in BACKENDS:
        metrics.attention_backend(backend)
    families = sorted(metrics.registry.collect(), key=lambda family: family.name)
    rows, buckets = [], {}
    uses = _uses()
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        samples = [one for one in family.samples if not one.name.endswith("_created")]
        labels = {label: set() for one in samples for label in one.labels}
        for one in samples:
            for label, value in one.labels.items():
                labels[label].add(value)
        bounds = sorted({float(value) for value in labels.pop("le", ())})[:-1]
        if bounds:
            buckets[name] = bounds
        shown = [
            label if label == "model_name" else f"{label}: {', '.join(sorted(values))}"
            for label, values in labels.items()
        ]
        used = [user for one, users in uses.items() if _family(one) in (name, family.name)
                for user in users]  # fmt: skip
        used = ", ".join(dict.fromkeys(used)) or "-"
        rows.append((code(name), family.type, "; ".join(shown), family.documentation, used))
    text = table(("series", "type", "labels", "meaning", "used by"), rows)
    shared = {}
    for name, bounds in buckets.items():
        shared.setdefault(tuple(bounds), []).append(name)
    told = table(
        ("histograms", "buckets, upper bounds; then +Inf"),
        [
            (", ".join(map(code, names)), ", ".join(f"{bound:.7g}" for bound in bounds))
            for bounds, names in shared.items()
        ],
    )
    return f"{text}\n\nBuckets:\n\n{told}"


def rules():
    """A row for each recording rule, and one for each alert."""
    recorded = [rule for rule in _rules() if "record" in rule]
    alerts = [rule for rule in _rules() if "alert" in rule]
    uses = _uses()
    recording = table(
        ("recorded", "expression", "used by"),
        [
            (
                code(rule["record"]),
                code(" ".join(rule["expr"].split())),
                ", ".join(dict.fromkeys(uses.get(rule["record"], ()))) or "-",
            )
            for rule in recorded
        ],
    )
    alerting = table(
        ("alert", "severity", "fires when", "for", "says"),
        [
            (
                rule["alert"],
                rule["labels"]["severity"],
                code(" ".join(rule["expr"].split())),
                rule["for"],
                _plain(rule["annotations"]["description"]),
            )
            for rule in alerts
        ],
    )
    return f"{recording}\n\n### Alerts\n\n{alerting}"


def alert_names():
    """Every alert, once."""
    return list(dict.fromkeys(rule["alert"] for rule in _rules() if "alert" in rule))


def _rules():
    for file in sorted((PROMETHEUS / "rules").glob("*.yml"), reverse=True):
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def _uses():
    """By series or recorded name: the rules, alerts and dashboards whose expressions name it."""
    found = {}
    for rule in _rules():
        user = f"[{rule['alert']}](operations.md#{rule['alert'].lower()})" if "alert" in rule else (
            code(rule["record"])
        )  # fmt: skip
        for name in _NAME.findall(rule["expr"]):
            found.setdefault(name, []).append(user)
    for file, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                for name in _NAME.findall(target["expr"]):
                    found.setdefault(name, []).append(f"dashboard {file.removesuffix('.json')}")
    return found


def _family(name):
    return re.sub(r"_(bucket|sum|count)$", "", name)


def _plain(text):
    """A template as a sentence: values become an ellipsis."""
    return re.sub(r"\{\{.*?\}\}", "…", " ".join(text.split()))
