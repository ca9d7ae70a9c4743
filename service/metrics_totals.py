"""All replicas' series as one page of Prometheus's text format.

Counters and histograms are sums over all replicas that ever reported, dead ones included. Gauges
are those of the live replicas, each with the label `replica`: of a share such as the KV cache's no
sum or mean would tell that one replica is full. `saccade_replicas` is summed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from service.metrics_snapshot import Family, Series, Snapshot

REPLICAS = "saccade_replicas"
WANTED = "saccade_replicas_wanted"


def counted(snapshots: Mapping[str, Snapshot]) -> dict[str, Snapshot]:
    """Those whose totals are in no other one."""
    absorbed = {name for one in snapshots.values() for name in one.absorbed}
    return {name: one for name, one in snapshots.items() if name not in absorbed}


def totals(snapshots: Mapping[str, Snapshot], now: float) -> list[Family]:
    """The series of all replicas.

    Args:
        snapshots: by the replica's name.
        now: Unix seconds at which they were read.
    """
    left = counted(snapshots)
    live = {name: one for name, one in left.items() if one.is_live(now)}
    found = summed(
        [family for family in one.families if family.kind != "gauge"] for one in left.values()
    )
    for name, one in (live or left).items():
        for family in one.families:
            if family.kind != "gauge":
                continue
            samples = found.setdefault(family.name, family._replace(samples={})).samples
            for (sample, labels), value in family.samples.items():
                if family.name == REPLICAS:
                    before = samples.get((sample, labels), 0.0)
                    samples[sample, labels] = before + (value if live else 0.0)
                elif live:
                    samples[sample, tuple(sorted((*labels, ("replica", name))))] = value
    return list(found.values())


def summed(parts: Iterable[Iterable[Family]]) -> dict[str, Family]:
    """Families by name, each series the sum over the parts that have it.

    Rounded once from the exact sum, so that no order of the parts makes a total smaller than it
    was: to Prometheus the least step back of a counter is a restart.
    """
    return _added(parts, math.fsum)


def absorbed(parts: Iterable[Iterable[Family]]) -> dict[str, Family]:
    """As `summed`, rounded upwards: what replaces the parts in a sum must not be less than they."""
    return _added(parts, _sum_upwards)


def render(families: Iterable[Family]) -> bytes:
    """Prometheus's text exposition format."""
    registry = CollectorRegistry()
    registry.register(_Page(list(families)))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.kind)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


def _added(
    parts: Iterable[Iterable[Family]], add: Callable[[Sequence[float]], float]
) -> dict[str, Family]:
    found: dict[str, tuple[Family, dict[Series, list[float]]]] = {}
    for part in parts:
        for family in part:
            _, values = found.setdefault(family.name, (family, {}))
            for series, value in family.samples.items():
                values.setdefault(series, []).append(value)
    return {
        name: family._replace(samples={series: add(several) for series, several in values.items()})
        for name, (family, values) in found.items()
    }


def _sum_upwards(values: Sequence[float]) -> float:
    total = math.fsum(values)
    return math.nextafter(total, math.inf) if math.fsum((*values, -total)) > 0 else total
