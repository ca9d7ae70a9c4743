"""An encoder's replica, as Ray Serve makes it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx

from service.config import ServiceConfig
from service.deployment import Replica
from service.metrics_ledger import Ledger
from service.metrics_totals import totals
from tests.service.test_replica_metrics import MemoryStore


def test_what_an_encoder_answered_is_on_the_page_of_all(encoder_folder, monkeypatch):
    store = MemoryStore()
    monkeypatch.setattr("service.deployment.RayStore", lambda: store)
    monkeypatch.setattr(
        "service.deployment.serve.get_replica_context",
        lambda: SimpleNamespace(replica_id=SimpleNamespace(unique_id="abc")),
    )
    replica = Replica(
        ServiceConfig(
            model=encoder_folder("BigBirdModel"),
            served_model_name="e",
            dtype="float32",
            device="cpu",
        )
    )

    async def ask():
        transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"input": ["one text", "and another"]}
            return await client.post("/v1/embeddings", json=body)

    try:
        assert Ledger(store).read().popitem()[1].condition.alive
        assert asyncio.run(ask()).status_code == 200
    finally:
        replica.__del__()
    ((name, snapshot),) = Ledger(store).read().items()
    assert name.startswith("abc-")
    assert snapshot.ended
    found = {
        series: value
        for family in totals({name: snapshot}, snapshot.taken)
        for series, value in family.samples.items()
    }
    labels = (("finished_reason", "stop"), ("model_name", "e"))
    assert found["saccade_request_success_total", labels] == 2
