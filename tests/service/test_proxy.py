"""What a client reads when the replica behind Serve's proxy ends its answer, or does not."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages

from service.proxy import middlewares


def asked(*messages):
    """The answer to a request whose replica sends `messages`."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    (middleware,) = middlewares()
    transport = httpx.ASGITransport(middleware.cls(app, *middleware.args, **middleware.kwargs))

    async def get():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    return asyncio.run(get())


def start(kind, status=200):
    headers = [(b"content-type", kind.encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(text, more_body):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more_body}


def test_an_event_stream_without_an_end_ends_with_an_error():
    answer = asked(start("text/event-stream; charset=utf-8"), part("data: {}\n\n", True))
    first, error, done, rest = answer.text.split("\n\n")
    assert (first, done, rest) == ("data: {}", "data: [DONE]", "")
    assert httpx.Response(200, text=error.removeprefix("data: ")).json()["error"] == {
        "message": "the replica that computed this answer was lost before its end; send the "
        "request again",
        "type": "service_unavailable",
        "param": None,
        "code": "replica_lost",
    }


def test_an_answer_that_did_not_begin_is_an_error_that_may_be_retried():
    answer = asked()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json", "text/plain"])
def test_whole_answers_pass_as_they_are(kind):
    answer = asked(start(kind), part("one", True), part("two", False))
    assert (answer.status_code, answer.text) == (200, "onetwo")
    refused = asked(start("application/json", 400), part("{}", False))
    assert (refused.status_code, refused.text) == (400, "{}")


def test_what_serve_says_in_plain_text_becomes_an_error_object():
    said = convert_object_to_asgi_messages(
        "too many requests", status_code=503, extra_headers=[(b"retry-after", b"7")]
    )
    answer = asked(*said)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["message"] == "too many requests"
    assert answer.json()["error"]["type"] == "service_unavailable"
    unknown = asked(*convert_object_to_asgi_messages("no such path", status_code=404))
    assert unknown.json()["error"]["type"] == "invalid_request_error"
