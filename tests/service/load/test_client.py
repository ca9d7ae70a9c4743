"""What the client measures against what a scripted server did, and how failures are told apart."""

from __future__ import annotations

import asyncio
import json
import socket

import numpy as np
import pytest
from aiohttp import web

from service.load.run import Loop, run
from service.load.summary import summarise
from tests.service.load.conftest import Nothing, Scripted, end, event, listening, planned, send
from tests.service.load.conftest import target as target_at


def put(scripted, plan, loop):
    """A run on a scripted server."""

    async def whole():
        async with listening(scripted) as url:
            return await run(plan, target_at(url), Nothing(), loop, name="test")

    return asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.mark.parametrize("users", [None, 4])
def test_latencies_agree_with_the_servers_own_within_two_percent(users):
    async def script(number, response):
        await asyncio.sleep(0.2)
        for _ in range(8):
            await scripted.token(number, response)
            await asyncio.sleep(0.05)
        await end(response, 8)

    scripted = Scripted(script)
    plan = [planned(None if users else 0.05 * number) for number in range(12)]
    outcomes = put(scripted, plan, Loop(users, 20.0))
    got = summarise(outcomes, [], load="test")
    first = [one.written[0] - one.received for one in scripted.stamps]
    last = [one.written[-1] - one.received for one in scripted.stamps]
    gaps = [gap for one in scripted.stamps for gap in np.diff(one.written)]
    tpots = [np.diff(one.written).mean() for one in scripted.stamps]
    late = np.mean([one.sent - one.due for one in outcomes])
    for measured, real, offset in (
        (got.ttft, first, late),
        (got.itl, gaps, 0),
        (got.tpot, tpots, 0),
        (got.e2e, last, late),
    ):
        assert measured.p50 == pytest.approx(np.median(real) + offset, rel=0.02)
        assert measured.mean == pytest.approx(np.mean(real) + offset, rel=0.02)
    assert (got.succeeded, got.output_tokens) == (12, 96)
    assert got.output_tokens_per_s == pytest.approx(96 / got.seconds)


def test_an_open_loop_does_not_wait_for_a_slow_server():
    """No request is answered before all have come: a loop that waits would never end."""
    everyone = asyncio.Event()

    async def script(number, response):
        if number == 29:
            everyone.set()
        await everyone.wait()
        await scripted.token(number, response)
        await end(response, 1)

    scripted = Scripted(script)
    plan = [planned(0.01 * number) for number in range(30)]
    outcomes = put(scripted, plan, Loop(None, 20.0))
    assert [one.error for one in outcomes] == [None] * 30
    assert [one.due for one in outcomes] == [one.at for one in plan]
    # What waited for the last to come waited the longer the earlier it was due.
    assert outcomes[0].ttft > outcomes[-1].ttft
    assert outcomes[0].ttft >= 0.29


def test_latency_counts_from_when_a_request_was_due():
    async def script(number, response):
        await scripted.token(number, response)
        await end(response, 1)

    scripted = Scripted(script)
    (outcome,) = put(scripted, [planned(0.0)], Loop(None, 20.0))
    outcome.due -= 5
    assert outcome.ttft > 5
    assert outcome.e2e > 5
    assert outcome.sent - outcome.due > 5


def test_a_closed_loop_has_so_many_requests_under_way():
    under_way, most = 0, 0

    async def script(number, response):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        await scripted.token(number, response)
        under_way -= 1
        await end(response, 1)

    scripted = Scripted(script)
    assert len(put(scripted, [planned()] * 20, Loop(3, 20.0))) == 20
    assert most == 3


def test_a_closed_loop_ends_with_its_duration():
    async def script(number, response):
        await scripted.token(number, response)
        await end(response, 1)

    scripted = Scripted(script)
    outcomes = put(scripted, [planned()] * 1_000_000, Loop(2, 20.0, duration=0.2))
    assert 0 < len(outcomes) < 1_000_000


# -- one request ------------------------------------------------------------------------------


async def _error_event(number, response):
    await response.write(event({"error": {"message": "lost the GPU", "type": "server_error"}}))
    await response.write(event("[DONE]"))


async def _no_json(number, response):
    await response.write(event("{half"))


async def _early_end(number, response):
    await response.write(event({"choices": [{"index": 0, "text": "a"}]}))


async def _hang_up(number, response):
    await response.write(event({"choices": [{"index": 0, "text": "a"}]}))
    response._req.transport.abort()


async def _hang(number, response):
    await response.write(event({"choices": [{"index": 0, "text": "a"}]}))
    await asyncio.sleep(20)


@pytest.mark.parametrize(
    ("script", "kind", "words", "tokens"),
    [
        (_error_event, "stream error", "lost the GPU", 0),
        (_no_json, "stream error", "not JSON", 0),
        (_early_end, "truncated", "[DONE]", 1),
        (_hang_up, "truncated", "", 1),
        (_hang, "timeout", "", 1),
    ],
)
def test_failures_behind_the_headers_are_told_apart(script, kind, words, tokens):
    outcome = send(Scripted(script), timeout=0.5 if kind == "timeout" else 20.0)
    assert outcome.error == kind
    assert words in outcome.detail
    assert len(outcome.tokens_at) == tokens
    assert outcome.ended > 0


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_a_status_is_an_error_of_its_own(status):
    async def script(number, request):
        return web.json_response({"error": {"message": "no"}}, status=status)

    outcome = send(Scripted(script, prepare=False))
    assert outcome.error == f"http {status}"
    assert "no" in outcome.detail


def test_no_server_is_a_connection_error():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"

        async def whole():
            return await run([planned()], target_at(url), Nothing(), Loop(1, 5.0), name="test")

        (outcome,) = asyncio.run(whole())
    assert outcome.error == "connection"
    assert not outcome.tokens_at


def test_an_answer_without_a_byte_is_a_connection_error():
    async def script(number, request):
        request.transport.abort()
        await asyncio.sleep(1)

    assert send(Scripted(script, prepare=False)).error == "connection"


def test_a_chat_is_counted_by_its_content_and_usage():
    async def script(number, response):
        def chunk(delta, finish=None):
            return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        for delta in ({"role": "assistant", "content": ""}, {"content": "a"}, {"content": ""}):
            await response.write(chunk(delta))
        await response.write(chunk({}, "stop"))
        await end(response, 5, sparsity={"density": 0.5, "coverage": None})

    outcome = send(Scripted(script), endpoint="chat")
    assert outcome.error is None
    assert len(outcome.tokens_at) == 2  # "a", and bytes that are no character yet
    assert (outcome.prompt_tokens, outcome.output_tokens) == (7, 5)
    assert outcome.sparsity == {"density": 0.5, "coverage": None}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_request_asks_for_a_stream_with_usage(endpoint):
    async def script(number, response):
        await end(response)

    scripted = Scripted(script)
    send(
        scripted,
        endpoint=endpoint,
        api_key="secret",
        sparsity={"policy": "dense"},
        extra={"top_k": 5, "temperature": 1},
    )
    (body,), (headers,) = scripted.bodies, scripted.headers
    assert headers["Authorization"] == "Bearer secret"
    limit = {"chat": "max_completion_tokens", "completions": "max_tokens"}[endpoint]
    assert body[limit] == 5
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"] is True
    assert body["sparsity"] == {"policy": "dense"}
    assert (body["top_k"], body["temperature"]) == (5, 1)
    asked = body["messages"][0]["content"] if endpoint == "chat" else body["prompt"]
    assert json.loads(json.dumps(asked)) == [1, 1, 1]


@pytest.mark.parametrize("users", [None, 1])
def test_prompts_that_begin_alike_name_their_session(users):
    async def script(number, response):
        await end(response)

    at = None if users else 0.0
    plan = [
        planned(at, prefix_tokens=2, group=4),
        planned(at, group=4),
        planned(at, blocks=(9, 7), group=1),
    ]
    scripted = Scripted(script)
    put(scripted, plan, Loop(users, 20.0))
    named = [headers.get("x-session-id") for headers in scripted.headers]
    assert sorted(map(str, named)) == ["None", "block-9", "group-4"]
