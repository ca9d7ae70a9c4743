"""A replica's reports: its series go to the ledger every second."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from service.metrics_snapshot import Condition, Snapshot, families_of
from service.metrics_totals import absorbed, counted, summed

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.engine.types import Health
    from service.metrics import Metrics
    from service.metrics_ledger import Ledger
    from service.metrics_snapshot import Family

INTERVAL = 1.0
"""Seconds between reports: the most that a hard kill loses."""
FORGOTTEN = 600.0
"""Seconds without a report after which no more will come from a replica that did not say so."""

_log = logging.getLogger("saccade.metrics")


class Reporter:
    """Reports until it is stopped, from a thread of its own.

    A replica that starts takes over the totals of those that have ended, so that the ledger holds
    about as many snapshots as there are replicas, however many there have been.

    Args:
        ledger: where to.
        name: of this replica; no other one has had it.
        metrics: what to report.
        health: how the engine is.
        clock: Unix seconds.
        interval: seconds between reports.
    """

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        metrics: Metrics,
        health: Callable[[], Health],
        clock: Callable[[], float] = time.time,
        interval: float = INTERVAL,
    ) -> None:
        self._ledger, self._name, self._metrics = ledger, name, metrics
        self._health, self._clock, self._interval = health, clock, interval
        self._inherited: tuple[Family, ...] = ()
        self._absorbed: tuple[str, ...] = ()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="saccade-reports", daemon=True)

    def start(self) -> None:
        """Report at once, and go on."""
        self._inherit()
        self.report()
        for name in self._absorbed:
            self._ledger.remove(name)
        self._thread.start()

    def stop(self) -> None:
        """Report for the last time; call it behind the engine's end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
            self.report(ended=True)

    def report(self, *, ended: bool = False) -> None:
        """Write this replica's snapshot."""
        health = self._health()
        condition = Condition(health.alive, health.degraded, health.reason, health.heartbeat_age)
        own = families_of(self._metrics.registry)
        families = tuple(summed([own, self._inherited]).values()) if self._inherited else own
        self._ledger.write(
            self._name, Snapshot(families, condition, self._clock(), ended, self._absorbed)
        )

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self.report()
            except Exception:  # noqa: BLE001  the counts are whole again with the next report
                _log.warning("metrics could not be reported; trying again", exc_info=True)

    def _inherit(self) -> None:
        """Take over what ended replicas have counted."""
        found = self._ledger.read()
        now = self._clock()
        mine = [
            name
            for name, one in counted(found).items()
            if (one.ended or now - one.taken > FORGOTTEN) and self._ledger.claim(name)
        ]
        parts = [
            [family for family in found[name].families if family.kind != "gauge"] for name in mine
        ]
        self._inherited = tuple(absorbed(parts).values())
        # What they had absorbed still lies there if they were killed in between.
        left = [old for name in mine for old in found[name].absorbed if old in found]
        self._absorbed = (*mine, *left)
