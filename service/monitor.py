"""`/metrics` and `/health` of all replicas, answered apart from them.

An application for each path, in processes that compute nothing else: no request for tokens is ever
in front of a scrape or of a probe. What they know comes from the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import request_response

from service.api.errors import add_handlers, error_object
from service.api.guard import Guard
from service.errors import EngineDeadError
from service.metrics_snapshot import Family
from service.metrics_totals import REPLICAS, WANTED, counted, render, totals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi import Request

    from service.api.guard import Keys
    from service.metrics_ledger import Ledger
    from service.metrics_snapshot import Snapshot

Answer = TypeVar("Answer")

PATIENCE = 2.0
"""Seconds that the ledger, or Serve's controller, has to answer."""

RECENT = 600.0
"""Seconds for which a dead replica's last words explain that none is alive."""


@dataclass(frozen=True, slots=True)
class Reading:
    """All snapshots, and when they were read, Unix seconds."""

    snapshots: dict[str, Snapshot]
    at: float


class Observer:
    """What is known of the replicas.

    Where Ray's control service does not answer, what it last said stands: requests do not pass
    through it, so its absence says nothing of them.

    Args:
        ledger: the replicas' reports.
        wanted: how many replicas there should be, where somebody knows; may block.
        why_none: why none runs, where somebody knows; may block.
        clock: Unix seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        wanted: Callable[[], int | None],
        why_none: Callable[[], str | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger, self._clock = ledger, clock
        self._wanted, self._why_none = wanted, why_none
        self._reader = ThreadPoolExecutor(1, "saccade-ledger")
        self._asker = ThreadPoolExecutor(1, "saccade-controller")
        self._last: Reading | None = None
        self._last_wanted: int | None = None

    async def reading(self) -> Reading:
        """The snapshots of now, or the last ones that could be had.

        Raises:
            EngineDeadError: none ever could.
        """
        try:
            self._last = await _within(PATIENCE, self._reader, self._read)
        except Exception:  # noqa: BLE001  Ray's own errors have no common root
            if self._last is None:
                raise EngineDeadError("Ray's control service does not answer") from None
        return self._last

    async def wanted(self) -> int | None:
        """How many replicas there should be, as last known."""
        with contextlib.suppress(Exception):
            self._last_wanted = await _within(PATIENCE, self._asker, self._wanted)
        return self._last_wanted

    async def why_none(self) -> str | None:
        """Why none runs, if somebody says so now."""
        with contextlib.suppress(Exception):
            return await _within(PATIENCE, self._asker, self._why_none)
        return None

    def _read(self) -> Reading:
        return Reading(self._ledger.read(), self._clock())


async def metrics(observer: Observer) -> Response:
    """All replicas' series in Prometheus's text format."""
    reading, wanted = await asyncio.gather(observer.reading(), observer.wanted())
    families = totals(reading.snapshots, reading.at)
    if all(family.name != REPLICAS for family in families):  # none has ever reported
        families.append(Family(REPLICAS, "gauge", "Replicas that are alive.", {(REPLICAS, ()): 0}))
    if wanted is not None:
        text = "Replicas that Ray Serve runs or tries to start."
        families.append(Family(WANTED, "gauge", text, {(WANTED, ()): wanted}))
    return Response(render(families), media_type=CONTENT_TYPE_LATEST)


async def health(observer: Observer) -> JSONResponse:
    """200 while at least one replica is alive, 503 and why when none is."""
    reading = await observer.reading()
    known = counted(reading.snapshots).values()
    live = [one.condition for one in known if one.is_live(reading.at)]
    if not live:
        told = EngineDeadError(await _why(observer, reading))
        return JSONResponse(error_object(told), told.status)
    degraded = [one for one in live if one.degraded]
    return JSONResponse(
        {
            "status": "degraded" if degraded else "ok",
            "reason": degraded[0].reason if degraded else None,
            "heartbeat_age_seconds": round(max(one.heartbeat_age for one in live), 3),
            "replicas": len(live),
        }
    )


async def _why(observer: Observer, reading: Reading) -> str:
    """One sentence."""
    if said := await observer.why_none():
        return f"no replica is alive: {said}"
    recent = [
        one
        for one in counted(reading.snapshots).values()
        if not one.ended and reading.at - one.taken < RECENT
    ]
    if not recent:
        return "no replica is alive; the first one may be starting"
    last = max(recent, key=lambda one: one.taken)
    if not last.condition.alive:
        return f"no replica is alive: {last.condition.reason}"
    return f"no replica is alive; the last report came {reading.at - last.taken:.0f} seconds ago"


def create_monitor_app(
    path: str, answer: Callable[[Observer], Awaitable[Response]], observer: Observer, keys: Keys
) -> FastAPI:
    """The application of one path; it may be mounted there."""

    async def only_here(request: Request) -> Response:
        if request.scope["path"].rstrip("/") != path:
            raise HTTPException(404)
        if request.method not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        return await answer(observer)

    # No routes: at the path where Serve mounts it none matches the rest, which is empty.
    app = FastAPI(title="Saccade", openapi_url=None, redirect_slashes=False)
    app.router.default = request_response(only_here)
    add_handlers(app)
    app.add_middleware(Guard, config=keys)
    return app


async def _within(
    seconds: float, executor: ThreadPoolExecutor, ask: Callable[[], Answer]
) -> Answer:
    loop = asyncio.get_running_loop()
    return await asyncio.wait_for(loop.run_in_executor(executor, ask), seconds)
