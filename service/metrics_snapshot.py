"""One replica's series at one moment, as plain data that other processes read."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

STALE = 10.0
"""Seconds without a report after which a replica counts as dead; it reports every second."""

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels, sorted."""


class Family(NamedTuple):
    """Samples of one name; `kind` is Prometheus's type: "counter", "gauge" or "histogram"."""

    name: str
    kind: str
    help: str
    samples: dict[Series, float]


class Condition(NamedTuple):
    """What a replica says of its engine."""

    alive: bool
    degraded: bool
    reason: str | None
    heartbeat_age: float  # seconds


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one replica has counted since its start.

    Attributes:
        families: its series; counters and histograms contain those of `absorbed`.
        condition: of its engine.
        taken: Unix seconds by the replica's clock.
        ended: it has stopped by itself, and nothing more will come.
        absorbed: names of ended replicas whose totals went over into this one.
    """

    families: tuple[Family, ...]
    condition: Condition
    taken: float
    ended: bool = False
    absorbed: tuple[str, ...] = ()

    def is_live(self, now: float) -> bool:
        """Whether the replica works, as far as its reports tell at `now`, Unix seconds."""
        return self.condition.alive and not self.ended and now - self.taken < STALE

    def encode(self) -> bytes:
        """Compressed JSON."""
        told = {
            "families": [
                (*about, [(name, labels, value) for (name, labels), value in samples.items()])
                for *about, samples in self.families
            ],
            "condition": self.condition,
            "taken": self.taken,
            "ended": self.ended,
            "absorbed": self.absorbed,
        }
        return zlib.compress(json.dumps(told, separators=(",", ":")).encode(), 1)

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """The inverse of `encode`."""
        told = json.loads(zlib.decompress(data))
        families = tuple(
            Family(
                *(name, kind, text),
                {
                    (sample, tuple((key, label) for key, label in labels)): value
                    for sample, labels, value in samples
                },
            )
            for name, kind, text, samples in told["families"]
        )
        return cls(
            families,
            Condition(*told["condition"]),
            told["taken"],
            told["ended"],
            tuple(told["absorbed"]),
        )


def families_of(registry: CollectorRegistry) -> tuple[Family, ...]:
    """All series of a registry but the times of their creation, which have no sum."""
    return tuple(
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for sample in metric.samples
                if not sample.name.endswith("_created")
            },
        )
        for metric in registry.collect()
    )
