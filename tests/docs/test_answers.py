"""The tables of answers in docs/server.md say what the applications answer."""

from __future__ import annotations

import json

import httpx
import pytest

from service.config import ServiceConfig
from service.encoders.app import create_encoder_app
from service.encoders.build import build_encoder
from tests.docs.answers import ANSWERS, QUERIES
from tests.docs.routes import everything
from tests.service.conftest import serving

PROMPT = "The old man went to the sea. " * 8
CHAT = [{"role": "user", "content": PROMPT}]
SMALL = {"max_tokens": 3, "temperature": 0}
STREAM = {"stream": True}
USAGE = {"stream_options": {"include_usage": True}}
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def leaves(value, declared, path=""):
    """(path, type) of all that is no object; empty lists and what `declared` leaves closed, too."""
    kind = declared.get(path, ("", ""))[0]
    if isinstance(value, dict):
        if "object by" in kind:
            yield path, "object"
            return
        if path in declared:
            yield path, "object"
        for name, inner in value.items():
            yield from leaves(inner, declared, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        if path in declared or not value:
            yield path, "array"
        for inner in value:
            yield from leaves(inner, declared, f"{path}[]")
    else:
        yield path, TYPES[type(value)]


def check(declared, answers):
    """Every field that was answered is declared with its type, and every declared one was seen."""
    found = {one for answer in answers for one in leaves(answer, declared)}
    for path, kind in sorted(found):
        assert path in declared, f"{path}, {kind}, stands in no table"
        said = declared[path][0]
        # JSON's numbers need not have a point.
        assert kind in said or (kind == "integer" and "number" in said), (
            f"{path}: {kind} is not {said}"
        )
    unseen = set(declared) - {path for path, _ in found}
    assert not unseen, f"no answer had {sorted(unseen)}"


def table(method, path, which=0):
    return list(ANSWERS[method, path].values())[which]


def ask(url, method, path, body=None, status=200):
    answer = httpx.request(method, url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def chunks(url, path, body):
    text = httpx.post(url + path, json=body | STREAM, timeout=60).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def requests(**prompt):
    """Bodies that together make every field of a whole answer show."""
    body = {"model": "tiny", **SMALL, **prompt}
    return [
        body,
        body | {"n": 2, "temperature": 1.0},
        body | {"sparsity": {"explain": True, "policy": "dense"}},
        body | {"sparsity": {"policy": "fixed", "pattern": "window:16"}},
        body | {"stop_token_ids": list(range(128)), "max_tokens": 8},
    ]


def test_completions(server):
    path = "/v1/completions"
    bodies = [*requests(prompt=PROMPT), {"model": "tiny", "prompt": "Oh", **SMALL}]
    bodies.append(bodies[0] | {"logprobs": 2, "echo": True})
    bodies.append(bodies[0] | {"stop": list("abcdefghijklmno"), "max_tokens": 200})
    check(table("POST", path), [ask(server, "POST", path, body) for body in bodies])
    streamed = [body for body in bodies if body.get("sparsity", {}).get("policy") != "dense"]
    streamed.append(bodies[0] | USAGE)
    streamed.append(bodies[0] | {"sparsity": {"explain": "tokens"}})
    found = [chunk for body in streamed for chunk in chunks(server, path, body)]
    check(table("POST", path, 1), found)


def test_chats(server):
    path = "/v1/chat/completions"
    bodies = [
        *requests(messages=CHAT),
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
    ]
    bodies[-1] |= SMALL
    bodies.append(bodies[0] | {"logprobs": True, "top_logprobs": 2})
    bodies.append(bodies[0] | {"stop": list("abcdefghijklmno"), "max_tokens": 200})
    check(table("POST", path), [ask(server, "POST", path, body) for body in bodies])
    streamed = [body for body in bodies if body.get("sparsity", {}).get("policy") != "dense"]
    streamed.append(bodies[0] | USAGE)
    streamed.append(bodies[0] | {"sparsity": {"explain": "tokens"}})
    found = [chunk for body in streamed for chunk in chunks(server, path, body)]
    check(table("POST", path, 1), found)


@pytest.mark.parametrize(
    ("method", "path", "bodies"),
    [
        ("GET", "/v1/models", [None]),
        ("GET", "/v1/patterns", [None]),
        ("GET", "/health", [None]),
        ("GET", "/version", [None]),
        (
            "POST",
            "/v1/patterns",
            [
                {"spec": "longformer", "length": 256},
                {"spec": "window:9&(strided:3+sinks:4)", "length": 99},
            ],
        ),
        (
            "POST",
            "/tokenize",
            [{"prompt": "Oh", "return_token_strs": True, "return_offsets": True}],
        ),
        ("POST", "/detokenize", [{"tokens": [65]}]),
    ],
)
def test_the_other_routes_of_a_decoder(server, method, path, bodies):
    check(table(method, path), [ask(server, method, path, body) for body in bodies])


def test_routes_with_something_in_the_address(server):
    found = ask(server, "GET", "/v1/models/tiny")
    check(table("GET", "/v1/models/{name}"), [found])
    found = ask(server, "GET", "/v1/patterns/auto?task=document&tokens=4096")
    check(table("GET", "/v1/patterns/auto"), [found])
    check(table("GET", "/v1/sample"), [ask(server, "GET", "/v1/sample?tokens=256&facts=1")])


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *(("/v1/sample", name, "-1") for name in ("tokens", "facts", "seed")),
        *(("/v1/patterns/auto?task=image", name, "x") for name in ("tokens", "rows", "cols")),
        ("/v1/patterns/auto", "task", "x"),
    ],
)
def test_parameters_of_the_address_are_read(server, path, name, value):
    mark = "&" if "?" in path else "?"
    refused = ask(server, "GET", f"{path}{mark}{name}={value}", status=400)
    assert refused["error"]["param"] == name
    listed = [row[0] for row in QUERIES["GET", path.split("?")[0]]]
    assert any(f"`{name}`" in one for one in listed)


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    """Factory of base URLs of encoders' applications; all are stopped at the end."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(architecture):
            config = ServiceConfig(model=encoder_folder(architecture), served_model_name="tiny")
            engine = build_encoder(config)
            engine.start()
            stack.callback(engine.stop)
            return stack.enter_context(serving(create_encoder_app(engine, config)))

        yield start


@pytest.mark.parametrize(
    ("architecture", "path", "bodies"),
    [
        (
            "LongformerModel",
            "/v1/embeddings",
            [{"input": "Oh"}, {"input": "Oh", "encoding_format": "base64"}],
        ),
        ("BigBirdForSequenceClassification", "/classify", [{"input": ["Oh", "no"]}]),
        ("LongformerForMaskedLM", "/fill-mask", [{"inputs": "An <mask> man."}]),
        (
            "BigBirdForQuestionAnswering",
            "/question-answering",
            [{"inputs": {"question": "Who?", "context": "The old man went."}}],
        ),
    ],
)
def test_encoders(encoder, architecture, path, bodies):
    url = encoder(architecture)
    check(table("POST", path), [ask(url, "POST", path, body) for body in bodies])


def test_every_route_has_a_table():
    assert set(ANSWERS) == set(everything())
    assert set(QUERIES) <= set(ANSWERS)
