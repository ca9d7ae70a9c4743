"""What a request that is refused is told: the field, and what to change, in the service's words."""

from __future__ import annotations

import pytest

from tests.service.fake import FakeEngine
from tests.service.test_api import HELLO, call, chat, complete


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": "4"}, "max_tokens", "must be an integer"),
        ({"max_tokens": -1}, "max_tokens", "must be at least 0"),
        ({"max_tokens": 10**9}, "max_tokens", "ask for at most "),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "lower it, or raise max_tokens"),
        ({"temperature": 3}, "temperature", "must be at most 2"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "must be greater than 0"),
        ({"top_k": 2**31}, "top_k", "must be less than 2147483648"),
        ({"stream": 1}, "stream", "must be true or false"),
        ({"stream_options": 3, "stream": True}, "stream_options", "must be an object"),
        ({"stop": 3}, "stop", "must be a list"),
        ({"stop": [3]}, "stop.0", "must be a string"),
        ({"logit_bias": []}, "logit_bias", "must be an object"),
        ({"cache_salt": ""}, "cache_salt", "must have 1 or more characters"),
        ({"cache_salt": "x" * 257}, "cache_salt", "must have at most 256 characters"),
        ({"sparsity": "dense"}, "sparsity", "must be an object"),
        (
            {"sparsity": {"policy": "nope"}},
            "sparsity.policy",
            "must be 'dynamic', 'fixed', 'dense' or 'auto'",
        ),
        ({"sparsity": {"polcy": "dense"}}, "sparsity.polcy", "unknown field"),
        ({"sparsity": {"explain": "x"}}, "sparsity.explain", 'must be true, false or "tokens"'),
        (
            {"sparsity": {"explain": True, "explain_heads": []}},
            "sparsity.explain_heads",
            "must have 1 or more entries",
        ),
    ],
)
def test_a_wrong_value_is_told_with_its_field(fields, param, message):
    error = complete(FakeEngine(), **fields).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert message in error["message"]


@pytest.mark.parametrize("send", [complete, chat])
@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("allowed_token_ids", [1], []),
        ("bad_words", ["a"], []),
        ("continue_final_message", True, False),
        ("prompt_logprobs", 1, None),
        ("truncate_prompt_tokens", 5, None),
    ],
)
def test_what_would_change_the_answer_and_is_not_offered_is_refused(send, field, value, harmless):
    refused = send(FakeEngine(), **{field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field
    assert send(FakeEngine(HELLO), **{field: harmless}).status_code == 200


def test_a_path_and_a_method_that_are_not_there_say_what_is():
    nothing = call(FakeEngine(), "/v1/nothing", method="GET")
    assert nothing.status_code == 404
    assert "docs/server.md" in nothing.json()["error"]["message"]
    wrong = call(FakeEngine(), "/v1/completions", method="GET")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"].endswith("use POST")
    wrong = call(FakeEngine(), "/health")
    assert wrong.json()["error"]["message"].endswith("use GET, HEAD")


@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_a_tool_that_was_called_is_not_forgotten(field):
    asked = {"role": "user", "content": "abc"}
    said = {"role": "assistant", "content": "", field: [{"id": "a"}]}
    error = chat(FakeEngine(), messages=[asked, said]).json()["error"]
    assert "calls of tools are not supported" in error["message"]
    assert chat(FakeEngine(HELLO), messages=[asked, said | {field: None}]).status_code == 200


def test_a_chat_is_answered():
    error = chat(FakeEngine(), add_generation_prompt=False).json()["error"]
    assert error["param"] == "add_generation_prompt"
    assert chat(FakeEngine(HELLO), add_generation_prompt=True).status_code == 200
