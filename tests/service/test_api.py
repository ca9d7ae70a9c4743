"""The application over a scripted engine: what goes in, what comes out, and what goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re

import httpx
import pytest

from models.generation import GenerationDefaults
from service.api.app import create_app
from service.api.request_id import RequestId
from service.config import ServiceConfig
from service.engine.types import Health
from service.errors import EngineDeadError, OverloadedError, RequestError
from tests.service.fake import REPORT, FakeEngine, delta

HELLO = [delta("H"), delta("i"), delta(finish="stop")]


def call(engine, path="/v1/completions", *, method="POST", headers=None, config=None, **request):
    """One request to the application over `engine`."""

    async def send():
        transport = httpx.ASGITransport(create_app(engine, config or ServiceConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers, **request)

    return asyncio.run(asyncio.wait_for(send(), 10))


def complete(engine, **fields):
    return call(engine, json={"model": "fake", "prompt": "abc"} | fields)


def chat(engine, **fields):
    messages = [{"role": "user", "content": "abc"}]
    return call(
        engine, "/v1/chat/completions", json={"model": "fake", "messages": messages} | fields
    )


def events(response):
    """The JSON of every event but the last, which must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# -- answers ----------------------------------------------------------------------------------


def test_a_completion_has_openais_shape_and_the_report():
    answer = complete(FakeEngine(HELLO)).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake"
    assert answer["choices"] == [
        {"index": 0, "text": "Hi", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["sparsity"] == {
        "policy": "dynamic",
        "density": 0.1,
        "coverage": 0.98,
        "coverage_p5": 0.9,
        "keys_attended": 100.0,
        "fallbacks": {"low_coverage": 1},
        "prefill": None,
    }


def test_a_chat_stream_opens_with_the_role_and_ends_with_usage():
    response = chat(FakeEngine(HELLO), stream=True, stream_options={"include_usage": True})
    first, *pieces, last = events(response)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == "Hi"
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in (first, *pieces))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert last["sparsity"]["density"] == 0.1
    assert len({chunk["id"] for chunk in (first, *pieces, last)}) == 1


def test_without_usage_the_last_choice_carries_the_report():
    *pieces, last = events(complete(FakeEngine(HELLO), stream=True))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["sparsity"]["keys_attended"] == 100.0
    assert not any("usage" in chunk or "sparsity" in chunk for chunk in pieces)


def test_continuous_usage_counts_up():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(complete(FakeEngine(HELLO), stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("send", [complete, chat])
def test_usage_tells_what_of_the_prompt_was_cached(send, stream):
    script = [delta("H", cached_tokens=2), delta("i", finish="stop")]
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    response = send(FakeEngine(script), stream=stream, **(options if stream else {}))
    told = events(response) if stream else [response.json()]
    assert {chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in told} == {2}


@pytest.mark.parametrize("send", [complete, chat])
def test_a_salt_reaches_the_engine(send):
    engine = FakeEngine(HELLO, HELLO, HELLO)
    for salt in ({}, {"cache_salt": None}, {"cache_salt": "tenant"}):
        assert send(engine, **salt).status_code == 200
    assert [one.cache_salt for one in engine.submitted] == ["", "", "tenant"]
    for salt in ("", "x" * 257, 5, ["x"]):
        refused = send(engine, cache_salt=salt)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "cache_salt"


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(stream):
    def script(letter):
        return [
            delta(letter, 0, "length"),
            delta(letter.upper(), 1, "length"),
        ]

    response = complete(
        FakeEngine(script("a"), script("b")), prompt=["x", "yz"], n=2, stream=stream
    )
    if stream:
        chunks = events(response)
        choices = [chunk["choices"][0] for chunk in chunks]
        answer = chunks[-1]
    else:
        answer = response.json()
        choices = answer["choices"]
    texts = {choice["index"]: choice["text"] for choice in choices}
    assert texts == {0: "a", 1: "A", 2: "b", 3: "B"}
    assert all(choice["sparsity"]["density"] == 0.1 for choice in choices)
    assert answer["sparsity"]["fallbacks"] == {"low_coverage": 4}


def test_echo_puts_the_prompt_before_every_choice():
    script = [delta("x", 0, "length"), delta("y", 1, "length")]
    answer = complete(FakeEngine(script), echo=True, n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abcx", "abcy"]
    chunks = events(complete(FakeEngine(script), echo=True, n=2, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abc", "x", "abc", "y"]


# -- what the engine is told ------------------------------------------------------------------


def test_sampling_and_sparsity_reach_the_engine():
    engine = FakeEngine(HELLO)
    complete(
        engine,
        temperature=0,
        top_k=5,
        min_p=0.1,
        stop="x",
        stop_token_ids=[7],
        logit_bias={"5": -100},
        logprobs=2,
        echo=True,
        seed=3,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        sparsity={"policy": "fixed", "pattern": "window:64", "max_keys": 200},
        unknown_field=1,
    )
    (sent,) = engine.submitted
    sampling, sparsity = sent.sampling, sent.sparsity
    assert sent.prompt == [97, 98, 99]
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.0, 5, 0.1)
    assert (sampling.stop, sampling.stop_token_ids) == (("x",), (7,))
    assert sampling.logit_bias == ((5, -100.0),)
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.seed) == (2, 2, 3)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (9, 2, True)
    assert (sparsity.policy, sparsity.pattern, sparsity.max_keys) == ("fixed", "window:64", 200)
    assert sparsity.min_keys == 200  # the service's own moves along
    assert sparsity.coverage == 0.98


def test_nulls_count_as_absent_and_auto_is_resolved():
    engine = FakeEngine(HELLO)
    response = complete(
        engine, stop=None, n=None, seed=None, temperature=None, sparsity={"policy": "auto"}
    )
    assert response.status_code == 200
    (sent,) = engine.submitted
    assert (sent.n, sent.sampling.stop, sent.sampling.temperature) == (1, (), 1.0)
    assert sent.sparsity.policy == "dynamic"


def test_the_checkpoints_proposed_sampling_is_the_default_and_not_more():
    proposed = GenerationDefaults(temperature=0.6, top_k=20)
    engine = FakeEngine(HELLO, HELLO, generation=proposed)
    complete(engine)
    complete(engine, temperature=1.0, top_k=-1)
    first, second = (sent.sampling for sent in engine.submitted)
    assert (first.temperature, first.top_k) == (0.6, 20)
    assert (second.temperature, second.top_k) == (1.0, 0)


@pytest.mark.parametrize(
    ("send", "fields", "expected"),
    [
        (complete, {}, 16),
        (complete, {"prompt": "x" * 95}, 5),
        (complete, {"max_tokens": 0, "echo": True, "prompt": "x" * 100}, 0),
        (chat, {}, 97),
        (chat, {"max_tokens": 5}, 5),
        (chat, {"max_tokens": 5, "max_completion_tokens": 6}, 6),
    ],
)
def test_the_length_of_an_answer(send, fields, expected):
    engine = FakeEngine(HELLO)
    assert send(engine, **fields).status_code == 200
    assert engine.submitted[0].sampling.max_tokens == expected


def test_parts_of_a_message_are_joined_and_developer_means_system():
    engine = FakeEngine(HELLO)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    response = chat(engine, messages=[{"role": "developer", "content": parts}])
    assert response.status_code == 200
    assert engine.submitted[0].prompt == [ord("a"), ord("\n"), ord("b")]


# -- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (OverloadedError("the queue is full", 2.2), 503, "3"),
        (EngineDeadError("the engine has stopped"), 503, "10"),
        (RequestError("prompt is wrong", param="prompt"), 400, None),
    ],
)
def test_a_refused_prompt_is_a_status_and_frees_the_prompts_before_it(stream, error, status, retry):
    engine = FakeEngine(HELLO, error)
    response = complete(engine, prompt=["a", "b"], stream=stream)
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry
    assert response.json()["error"]["message"] == str(error)
    assert engine.streams[0].closed


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status(stream):
    engine = FakeEngine([delta(finish="error", error="the kernel failed")])
    response = complete(engine, stream=stream)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the kernel failed"
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
def test_an_error_in_mid_stream_is_an_event(prompts):
    broken = [delta("H"), delta(finish="error", error="the kernel failed")]
    engine = FakeEngine(broken, [delta("x"), "hang"])
    chunks = events(complete(engine, prompt=prompts, stream=True))
    assert chunks[-1]["error"]["message"] == "the kernel failed"
    assert all(stream.closed for stream in engine.streams)


@pytest.mark.parametrize("send", [complete, chat])
@pytest.mark.parametrize("usage", [False, True])
def test_tokens_that_arrive_at_once_are_as_many_events(send, usage):
    script = [delta("H"), delta("\u2028é"), delta("i"), delta(finish="stop")]
    options = {"include_usage": usage, "continuous_usage_stats": usage}

    def told(script):
        chunks = events(send(FakeEngine(script), stream=True, stream_options=options))
        return [chunk | {"id": "", "created": 0} for chunk in chunks]

    one_by_one = told(script)
    assert told([script]) == one_by_one
    assert told([script[0], script[1:]]) == one_by_one


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
def test_tokens_that_arrive_with_an_error_are_sent_before_it(prompts):
    broken = [delta("H"), [delta("i"), delta(finish="error", error="the kernel failed")]]
    engine = FakeEngine(broken, [delta("x"), "hang"])
    *chunks, error = events(complete(engine, prompt=prompts, stream=True))
    texts = [chunk["choices"][0]["text"] for chunk in chunks if not chunk["choices"][0]["index"]]
    assert texts == ["H", "i"]
    assert error["error"]["message"] == "the kernel failed"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_stops_is_503_or_an_event(stream):
    response = complete(FakeEngine([delta("H"), delta(finish="abort")]), stream=stream)
    if stream:
        assert "stopping" in events(response)[-1]["error"]["message"]
    else:
        assert response.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_error_has_a_number_and_no_details(stream, caplog):
    response = complete(FakeEngine([ZeroDivisionError("secret")]), stream=stream)
    assert response.status_code == 500
    message = response.json()["error"]["message"]
    assert "secret" not in response.text
    assert message.split()[2].rstrip(";") in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_an_unforeseen_error_in_mid_stream_is_an_event():
    chunks = events(complete(FakeEngine([delta("H"), ZeroDivisionError("secret")]), stream=True))
    assert "internal error" in chunks[-1]["error"]["message"]
    assert "secret" not in chunks[-1]["error"]["message"]


def scope_of(body, path="/v1/completions"):
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
        "root_path": "",
    }


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
@pytest.mark.parametrize("script", [["hang"], [delta("H"), "hang"]])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["disconnect", "cancel"])
def test_a_client_that_leaves_stops_the_work(stream, script, prompts, how):
    engine = FakeEngine(*(script for _ in prompts))
    body = json.dumps({"model": "fake", "prompt": prompts, "stream": stream}).encode()

    async def leave():
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_):
            await asyncio.sleep(0)

        before = asyncio.all_tasks()
        app = create_app(engine, ServiceConfig())
        request = asyncio.create_task(app(scope_of(body), receive, send))
        for _ in range(200):
            await asyncio.sleep(0.001)
        assert not any(one.closed for one in engine.streams)
        assert len(engine.streams) == len(prompts)
        if how == "cancel":
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        else:
            gone.set()
            await request
        assert all(one.closed for one in engine.streams)
        await asyncio.sleep(0.001)
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(leave(), 10))


# -- limits and keys --------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_413_before_it_is_read_whole(declared):
    read = 0

    async def chunks():
        nonlocal read
        for _ in range(100):
            read += 1
            yield b" " * 2**16

    headers = {"content-type": "application/json"}
    if declared:
        headers["content-length"] = str(100 * 2**16)
    response = call(
        FakeEngine(), content=chunks(), headers=headers, config=ServiceConfig(max_body_mib=0.25)
    )
    assert response.status_code == 413
    assert "262144" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/health", None, 200),
        ("/metrics", None, 200),
        ("/v1/models", None, 401),
        ("/v1/models", "Bearer wrong", 401),
        ("/v1/models", "Basic s3cret", 401),
        ("/v1/models", "Bearer s3cret", 200),
        ("/v1/models", "bearer s3cret", 200),
        ("/version", None, 401),
        ("/nowhere", None, 401),
        ("/health/", None, 401),
        ("//health", None, 401),
        ("/tokenize", None, 401),
    ],
)
def test_every_path_but_the_open_ones_asks_for_the_key(path, key, status):
    headers = {"authorization": key} if key else {}
    response = call(
        FakeEngine(), path, method="GET", headers=headers, config=ServiceConfig(api_key="s3cret")
    )
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_metrics_can_ask_for_the_key_too():
    config = ServiceConfig(api_key="s3cret", metrics_need_key=True)
    assert call(FakeEngine(), "/metrics", method="GET", config=config).status_code == 401


@pytest.mark.parametrize(
    ("given", "told"), [({}, r"[0-9a-f]{32}"), ({"X-Request-ID": "mine"}, "mine")]
)
def test_an_answer_has_its_requests_id_once(given, told):
    app = RequestId(create_app(FakeEngine(), ServiceConfig(api_key="s3cret")))

    async def ask(path):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x"
        ) as one:
            return await one.get(path, headers=given)

    for path in ("/health", "/v1/models"):  # an answer, and a refusal
        (found,) = asyncio.run(ask(path)).headers.get_list("x-request-id")
        assert re.fullmatch(told, found)


# -- status -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "status", "said"),
    [
        (Health(True, 0.1), 200, "ok"),
        (Health(True, 0.1, True, "a kernel failed"), 200, "degraded"),
        (Health(False, 99.0, reason="no step for 99 seconds"), 503, "no step for 99 seconds"),
    ],
)
def test_health_follows_the_engines_heartbeat(health, status, said):
    response = call(FakeEngine(health=health), "/health", method="GET")
    assert response.status_code == status
    assert said in response.text


def test_a_rejected_body_is_not_sent_back():
    noise = "n" * 100_000
    response = complete(FakeEngine(), sparsity={noise: 1, noise + "b": 2}, temperature=noise)
    assert response.status_code == 400
    assert len(response.content) < 2000


def test_a_priority_reaches_the_engine_for_every_prompt():
    engine = FakeEngine(HELLO, HELLO)
    assert complete(engine, prompt=["abc", "def"], priority=-7).status_code == 200
    assert [one.priority for one in engine.submitted] == [-7, -7]
    engine = FakeEngine(HELLO, HELLO)
    assert chat(engine, priority=3).status_code == chat(engine).status_code == 200
    assert [one.priority for one in engine.submitted] == [3, 0]


def test_priorities_can_be_turned_off():
    config = ServiceConfig(limits={"priority": 0})
    body = {"model": "fake", "prompt": "abc"}
    assert call(FakeEngine(HELLO), config=config, json=body | {"priority": 0}).status_code == 200
    refused = call(FakeEngine(), config=config, json=body | {"priority": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    assert "0 to 0" in refused.json()["error"]["message"]


def test_an_answer_tells_of_overload_at_its_end():
    cut = dataclasses.replace(REPORT, fallbacks={"overload": 9})
    script = [delta("H"), delta(finish="stop", sparsity=cut)]
    assert complete(FakeEngine(script)).json()["sparsity"]["fallbacks"] == {"overload": 9}
    streamed = events(complete(FakeEngine(script), stream=True))
    told = [one["sparsity"]["fallbacks"] for one in streamed if "sparsity" in one]
    assert told == [{"overload": 9}] and "sparsity" in streamed[-1]
