"""The pattern endpoints: what they tell is what the kernels' patterns say, in bounded work."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64decode

import httpx
import numpy as np
import pytest
import torch

from kernels.patterns.parse import PRIMITIVES
from kernels.patterns.pattern import Pattern
from kernels.patterns.presets import TASKS, auto, recognise
from kernels.patterns.published import SPECS
from service.api import patterns as endpoint
from service.api.app import create_app
from service.api.desk import QUEUE, Desk
from service.config import ServiceConfig
from service.errors import OverloadedError
from tests.service.fake import FakeEngine, delta
from tests.service.test_api import call, complete


def look(spec, length=100, **fields):
    body = {"spec": spec, "length": length} | fields
    return call(FakeEngine(), "/v1/patterns", json=body)


def test_the_catalogue_lists_what_there_is():
    told = call(FakeEngine(), "/v1/patterns", method="GET").json()
    assert [one["name"] for one in told["primitives"]] == [kind.name for kind in PRIMITIVES]
    for one, kind in zip(told["primitives"], PRIMITIVES, strict=True):
        assert Pattern.parse(one["example"]).expression == kind(*kind.example)
        assert len(one["parameters"]) == len(kind.example)
        assert one["description"].endswith(".")
    assert {one["name"]: one["spec"] for one in told["presets"]} == dict(SPECS)
    assert told["tasks"] == list(TASKS)


@pytest.mark.parametrize("kind", ["", "@bidirectional"])
@pytest.mark.parametrize("kind_of", PRIMITIVES)
@pytest.mark.parametrize("length", [1, 63, 130])
def test_a_view_is_what_the_pattern_says(kind_of, kind, length):
    pattern = Pattern.parse(f"{kind_of(*kind_of.example)}{kind}")
    told = look(str(pattern), length, cells=256).json()
    mask = pattern.mask(length, length)
    shown = np.frombuffer(b64decode(told["mask"]["primitive"]), "<u1").reshape(
        told["mask"]["shape"]
    )
    assert torch.equal(torch.from_numpy(shown.astype(bool)), mask)
    assert told["pairs"] == int(mask.sum())
    assert told["sparsity"] == pytest.approx(pattern.sparsity(length))
    assert told["keys_per_query"] == {"step": 1, "values": mask.sum(1).tolist()}
    assert told["recognised"] == recognise(pattern)
    assert told["complexity"] == pattern.complexity
    assert told["keeps_previous"] is pattern.keeps_previous
    assert str(pattern) in told["summary"]


def test_a_part_of_a_long_mask_is_shown_in_cells():
    told = look("bigbird", 4096, rows=[1000, 3000], columns=[0, 1024], cells=64).json()
    mask, pattern = told["mask"], Pattern.parse("bigbird")
    assert (mask["step"], mask["rows"], mask["columns"]) == (32, [992, 3008], [0, 1024])
    share = np.frombuffer(b64decode(mask["share"]), "<u1").reshape(mask["shape"])
    exact = pattern.mask(2016, 1024, 992).float().reshape(63, 32, 32, 32).mean((1, 3))
    assert np.abs(share / 255 - exact.numpy()).max() < 1 / 200
    assert told["keys_per_query"]["step"] == 64
    assert sum(told["keys_per_query"]["values"]) * 64 == pytest.approx(told["pairs"], rel=1e-4)


def test_terms_spell_what_has_no_parentheses():
    told = look("sinks:4 + window:16&strided:2 @bidirectional").json()
    terms = [(one["operator"], one["spec"]) for one in told["terms"]]
    assert terms == [("", "sinks:4"), ("+", "window:16"), ("&", "strided:2")]
    assert "".join(a + b for a, b in terms) + "@bidirectional" == told["spec"]
    assert look("(sinks:4+window:16)&strided:2").json()["terms"] is None
    assert look("window:9", causal=False).json()["spec"] == "window:9@bidirectional"


@pytest.mark.parametrize(
    ("spec", "position"),
    [("windw:3", 0), ("window:8+", 9), ("sinks:4+window:x", 15), ("x" * 300, 256)],
)
def test_a_mistake_is_pointed_at(spec, position):
    answer = look(spec)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"], error["position"]) == (
        "spec",
        "invalid_pattern",
        position,
    )
    if len(spec) < 100:
        assert error["message"].endswith(f"\n  {spec}\n  {' ' * position}^")


def test_a_completion_points_at_a_mistake_in_its_pattern_too():
    answer = complete(FakeEngine(), sparsity={"pattern": "sinks:4+windw:3"})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["position"]) == ("sparsity.pattern", 8)
    assert error["message"].endswith("\n          ^")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"length": 0}, "length"),
        ({"length": 2**21}, "length"),
        ({"cells": 257}, "cells"),
        ({"rows": [5, 5]}, "rows"),
        ({"columns": [0, 101]}, "columns"),
        ({"columns": [-1, 4]}, "columns"),
        ({"length": 65536}, "rows"),
        ({"sped": 1}, "sped"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(fields, param):
    answer = look("window:8", **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


HOSTILE = [
    "axial:61,59+axial:53,47+axial:43,41",
    "+".join(f"axial:{n},{n + 2}" for n in range(31, 47)),
    "+".join(["random:2147483648,0"] * 8) + "@bidirectional",
    "&".join(f"strided:{n}" for n in range(101, 117)),
    "+".join(["full"] * 16),
]


@pytest.mark.parametrize("spec", HOSTILE)
def test_hostile_patterns_are_answered_or_refused(spec):
    answer = look(spec, 2**20, rows=[0, 16384], columns=[0, 16384], cells=256)
    assert answer.status_code in (200, 400)


def test_other_requests_do_not_wait_for_a_pattern(monkeypatch):
    """While one is looked at, the event loop goes on, and few may wait."""
    begun, release = [], threading.Event()

    def slow(asked):
        begun.append(asked)
        release.wait(5)
        return {"object": "pattern.view"}

    monkeypatch.setattr(endpoint, "_view", slow)
    app = create_app(FakeEngine([delta("H", finish="stop")]), ServiceConfig())

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"spec": "full", "length": 8}
            asked = [
                asyncio.create_task(client.post("/v1/patterns", json=body))
                for _ in range(QUEUE + 4)
            ]
            while not begun:
                await asyncio.sleep(0.01)
            answer = await client.post("/v1/completions", json={"model": "fake", "prompt": "a"})
            assert answer.status_code == 200
            assert len(begun) == 1
            release.set()
            return [one.status_code for one in await asyncio.gather(*asked)]

    statuses = asyncio.run(asyncio.wait_for(run(), 10))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) == QUEUE + 1


def test_a_desk_frees_its_places():
    async def run():
        desk = Desk()
        for _ in range(3 * QUEUE):
            assert await desk.run(lambda: 1) == 1
        with pytest.raises(ZeroDivisionError):
            await desk.run(lambda: 1 / 0)
        with pytest.raises(OverloadedError):
            await asyncio.gather(*(desk.run(lambda: 1) for _ in range(2 * QUEUE)))

    asyncio.run(run())


@pytest.mark.parametrize("task", TASKS)
def test_auto_is_the_kernels(task):
    path = f"/v1/patterns/auto?task={task}&tokens=4096&rows=8&cols=16&causal=false"
    answer = call(FakeEngine(), path, method="GET").json()
    assert answer["spec"] == str(auto(task, 4096, (8, 16), causal=False))


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("task=chess", "task"),
        ("task=image", "rows"),
        ("task=video&rows=8", "rows"),
        ("task=document&tokens=x", "tokens"),
        ("task=document&causal=maybe", "causal"),
    ],
)
def test_auto_says_what_is_wrong(query, param):
    answer = call(FakeEngine(), f"/v1/patterns/auto?{query}", method="GET")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_pattern_may_lose_the_previous_key_only_where_it_was_asked_for():
    pattern = "strided:8"
    for policy in ("fixed", "dense"):
        engine = FakeEngine([delta("H", finish="stop")])
        answer = complete(engine, sparsity={"policy": policy, "pattern": pattern})
        assert answer.status_code == 200
        assert engine.submitted[0].sparsity.pattern == pattern
    for sparsity in ({"pattern": pattern}, {"policy": "dynamic", "pattern": pattern}):
        error = complete(FakeEngine(), sparsity=sparsity).json()["error"]
        assert error["param"] == "sparsity.pattern"
        assert "write strided:8+window:2" in error["message"]


# -- the page ---------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served_under_a_strict_policy():
    page = call(FakeEngine(), "/explorer", method="GET")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "<script>" not in page.text and "style=" not in page.text and "onclick=" not in page.text
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css")):
        file = call(FakeEngine(), f"/explorer/{name}", method="GET")
        assert file.status_code == 200
        assert file.headers["content-type"].startswith(kind)
        assert "http://" not in file.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in file.text


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fcli.py", "%2e%2e/cli.py", "a/b.js"])
def test_there_is_nothing_else_beside_the_page(name):
    assert call(FakeEngine(), f"/explorer/{name}", method="GET").status_code == 404


def test_the_page_loads_without_the_key_that_its_requests_need():
    config = ServiceConfig(api_key="secret")
    for path in ("/explorer", "/explorer/app.js"):
        assert call(FakeEngine(), path, method="GET", config=config).status_code == 200
    for path in ("/v1/patterns", "/v1/sample", "/explorers"):
        assert call(FakeEngine(), path, method="GET", config=config).status_code == 401


def test_a_sample_holds_its_facts(server):
    told = httpx.get(f"{server}/v1/sample?tokens=200&facts=2&seed=5").json()
    assert told == httpx.get(f"{server}/v1/sample?tokens=200&facts=2&seed=5").json()
    assert len(told["facts"]) == len(told["questions"]) == 2
    for fact, question in zip(told["facts"], told["questions"], strict=True):
        planted = told["text"][fact["start"] : fact["end"]]
        assert fact["key"] in planted and fact["value"] in planted
        assert fact["key"] in question
    assert httpx.get(f"{server}/v1/sample?tokens=9999999").status_code == 400


def test_tokens_know_where_they_stand_in_the_text(server):
    text = "h\u00e9llo \U0001f600 world"
    told = httpx.post(
        f"{server}/tokenize",
        json={"messages": [{"role": "user", "content": text}], "return_offsets": True},
    ).json()
    assert text in told["text"] and told["text"].startswith("<|user|>")
    assert len(told["offsets"]) == len(told["tokens"])
    assert told["text"][slice(*told["offsets"][0])] == "<|user|>"
    assert json.dumps(told["offsets"][-1]) == json.dumps(
        [len(told["text"]) - 13, len(told["text"])]
    )
