"""The official client against the real engine on a tiny checkpoint."""

from __future__ import annotations

import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import MAX_MODEL_LEN, VOCAB_SIZE

PROMPT = "The old man went to the river and sat there until the evening came. " * 3
CHAT = [{"role": "user", "content": "Where did he go?"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt=PROMPT, **options):
    options = {"max_tokens": 12, "temperature": 0} | options
    return client.completions.create(model="tiny", prompt=prompt, **options)


def chat(client, messages=CHAT, **options):
    options = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model="tiny", messages=messages, **options)


# -- what works -------------------------------------------------------------------------------


def test_it_completes_and_says_where_attention_looked(client):
    prompt = PROMPT * 2
    # A sample would read all of so short a context.
    few = {"sampled": False, "max_keys": 100}
    answer = complete(client, prompt, extra_body={"sparsity": few})
    (choice,) = answer.choices
    assert len(choice.text) == 12
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt) + 1
    assert answer.usage.completion_tokens == 12
    report = answer.sparsity
    assert report["policy"] == "dynamic"
    assert 0 < report["density"] < 1
    assert 0 < report["coverage_p5"] <= report["coverage"] <= 1
    assert 0 < report["keys_attended"] < len(prompt)


@pytest.mark.parametrize("policy", ["dynamic", "fixed", "dense", "auto"])
def test_a_request_names_its_policy(client, policy):
    answer = complete(client, extra_body={"sparsity": {"policy": policy, "pattern": "window:64"}})
    assert answer.sparsity["policy"] == ("dynamic" if policy == "auto" else policy)
    if policy == "dense":
        assert answer.sparsity["density"] == 1.0
    if policy == "fixed":
        assert answer.sparsity["keys_attended"] == 64


def test_a_streamed_completion_is_the_whole_one_in_pieces(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.sparsity == whole.sparsity


def test_a_prompt_asked_twice_is_computed_once(client):
    prompt = "To be read twice. " * 20  # 361 tokens with the first, of which 3 pages are shared
    usage = []
    for salt in ("a", "a", "b"):
        answer = complete(client, prompt, extra_body={"cache_salt": salt})
        usage.append((answer.usage.prompt_tokens_details.cached_tokens, answer.choices[0].text))
    assert [cached for cached, _ in usage] == [0, 192, 0]
    assert len({text for _, text in usage}) == 1


def test_it_chats_whole_and_streamed(client):
    whole = chat(client)
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].message.content) == 12
    *pieces, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content for piece in pieces)
    assert text == whole.choices[0].message.content
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_a_chat_without_a_limit_fills_the_models_length(client):
    answer = chat(client, max_tokens=openai.omit, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == MAX_MODEL_LEN


def test_the_clients_own_stream_helper_understands_the_events(client):
    text = chat(client).choices[0].message.content
    # By a stop string, since the helper takes a text that was cut by length for an error.
    with client.chat.completions.stream(
        model="tiny", messages=CHAT, max_tokens=12, temperature=0, stop=text[6:9]
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == text[: text.index(text[6:9])]


def test_completion_logprobs_are_of_the_tokens_sampled(client):
    choice = complete(client, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == list(range(12))
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())  # greedy
        assert len(top) == 3


def test_echo_with_logprobs_scores_the_prompt(client):
    choice = complete(client, "abc", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert choice.text == "abc"
    assert choice.logprobs.tokens == ["<|begin|>", "a", "b", "c"]
    assert choice.logprobs.text_offset == [0, 0, 1, 2]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_echoed_logprobs_are_those_of_generation(client):
    generated = complete(client, logprobs=0)
    echoed = complete(
        client, PROMPT + generated.choices[0].text, echo=True, logprobs=0, max_tokens=0
    )
    got = echoed.choices[0].logprobs
    # Dense prefill reads more keys than the dynamic policy did, so the values are only close.
    assert got.tokens[-12:] == generated.choices[0].logprobs.tokens
    assert echoed.usage.prompt_tokens == generated.usage.total_tokens


def test_chat_logprobs_have_their_shape(client):
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client, stream):
    text = complete(client, max_tokens=40).choices[0].text
    stop = text[20:23]
    end = text.index(stop)
    answer = complete(client, max_tokens=40, stop=[stop], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[:end]
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].stop_reason == stop


def test_token_ids_and_lists_of_prompts_are_answered_in_order(client):
    texts = ["one", "another prompt", "x"]
    alone = [complete(client, text).choices[0].text for text in texts]
    together = complete(client, texts)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    ids = [
        httpx.post(f"{client.base_url}".replace("/v1/", "/tokenize"), json={"prompt": text}).json()[
            "tokens"
        ]
        for text in texts
    ]
    assert [choice.text for choice in complete(client, ids).choices] == alone
    assert complete(client, ids[1]).choices[0].text == alone[1]
    assert together.usage.prompt_tokens == sum(map(len, ids))


def test_choices_differ_and_a_seed_repeats_them(client):
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 20}
    first = complete(client, **options)
    second = complete(client, **options)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    assert all("density" in choice.sparsity for choice in first.choices)
    assert first.usage.completion_tokens == 60


def test_a_bias_decides(client):
    bias = {str(ord("Z") - 33): 100}  # byte-level alphabet: "!" is 0
    assert complete(client, logit_bias=bias, max_tokens=4).choices[0].text == "ZZZZ"


def test_models_are_listed_and_found(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").max_model_len == MAX_MODEL_LEN
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("other")


def test_tokens_go_there_and_back(server):
    sent = {"model": "tiny", "prompt": "naïve 文字", "return_token_strs": True}
    tokens = httpx.post(f"{server}/tokenize", json=sent).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == 14
    text = httpx.post(f"{server}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "<|begin|>naïve 文字"}
    turns = httpx.post(f"{server}/tokenize", json={"messages": CHAT}).json()
    text = httpx.post(f"{server}/detokenize", json={"tokens": turns["tokens"]}).json()
    assert text == {"prompt": "<|user|>Where did he go?<|end|><|assistant|>"}


def test_counters_count_what_was_served(server, client):
    def scrape():
        families = text_string_to_metric_families(httpx.get(f"{server}/metrics").text)
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    model = ("model_name", "tiny")
    before = scrape()
    for _ in range(3):
        complete(client)
    complete(client, "short")
    after = scrape()

    def grew(name, *labels):
        key = (f"saccade_{name}", *sorted((*labels, model)))
        return after[key] - before[key]

    assert grew("request_success_total", ("finished_reason", "length")) == 4
    assert grew("prompt_tokens_total") == 3 * (len(PROMPT) + 1) + 6
    assert grew("generation_tokens_total") == 48
    assert grew("time_to_first_token_seconds_count") == 4
    assert grew("e2e_request_latency_seconds_count") == 4
    assert grew("attention_density_count", ("layers", "first")) > 0
    assert grew("attention_coverage_sum", ("layers", "last")) > 0
    assert grew("attention_fallback_total", ("reason", "short_context"), ("to", "dense")) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_its_work(server, client, stream):
    def aborted():
        lines = httpx.get(f"{server}/metrics").text.splitlines()
        (line,) = (one for one in lines if 'finished_reason="abort"' in one and "_total" in one)
        return float(line.split()[-1])

    before = aborted()
    long = {"max_tokens": 250, "extra_body": {"ignore_eos": True}}
    if stream:
        with complete(client, stream=True, **long) as chunks:
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            complete(client, timeout=0.2, n=8, **long)
    while aborted() == before:
        time.sleep(0.02)
    assert aborted() == before + 1


# -- what does not ----------------------------------------------------------------------------

BAD_COMPLETIONS = {
    "unknown model": ({"model": "gpt-4"}, 404, "model"),
    "empty model": ({"model": ""}, 400, "model"),
    "model of a wrong type": ({"model": 3}, 400, "model"),
    "prompt of a wrong type": ({"prompt": {"text": "x"}}, 400, "prompt"),
    "no prompt in the list": ({"prompt": []}, 400, "prompt"),
    "empty list of token ids": ({"prompt": [[]]}, 400, "prompt"),
    "mixed prompts": ({"prompt": ["x", [1]]}, 400, "prompt"),
    "token id out of the vocabulary": ({"prompt": [1, VOCAB_SIZE]}, 400, "prompt"),
    "negative token id": ({"prompt": [[1], [-1]]}, 400, "prompt"),
    "fractional token id": ({"prompt": [1, 1.5]}, 400, "prompt"),
    "too many prompts": ({"prompt": ["x"] * 129}, 400, "prompt"),
    "prompt longer than the model's limit": ({"prompt": "x" * 600}, 400, "prompt"),
    "answer longer than the model's limit": ({"max_tokens": 500}, 400, "max_tokens"),
    "no tokens asked for": ({"max_tokens": 0}, 400, "max_tokens"),
    "negative max_tokens": ({"max_tokens": -1}, 400, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "5"}, 400, "max_tokens"),
    "min_tokens over max_tokens": ({"min_tokens": 13}, 400, "min_tokens"),
    "temperature too high": ({"temperature": 2.5}, 400, "temperature"),
    "negative temperature": ({"temperature": -0.1}, 400, "temperature"),
    "temperature as truth": ({"temperature": True}, 400, "temperature"),
    "top_p of zero": ({"top_p": 0}, 400, "top_p"),
    "top_p over one": ({"top_p": 1.1}, 400, "top_p"),
    "top_k under minus one": ({"top_k": -2}, 400, "top_k"),
    "min_p over one": ({"min_p": 1.5}, 400, "min_p"),
    "repetition_penalty of zero": ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    "presence_penalty": ({"presence_penalty": 3}, 400, "presence_penalty"),
    "frequency_penalty": ({"frequency_penalty": -3}, 400, "frequency_penalty"),
    "no choices": ({"n": 0}, 400, "n"),
    "too many choices": ({"n": 9}, 400, "n"),
    "too many choices over all prompts": ({"n": 8, "prompt": ["x"] * 33}, 400, "n"),
    "best_of": ({"best_of": 4}, 400, "best_of"),
    "seed too large": ({"seed": 2**63}, 400, "seed"),
    "too many stop strings": ({"stop": [str(i) for i in range(17)]}, 400, "stop"),
    "stop string too long": ({"stop": "x" * 257}, 400, "stop"),
    "empty stop string": ({"stop": [""]}, 400, "stop"),
    "stop of a wrong type": ({"stop": 5}, 400, "stop"),
    "stop strings of a wrong type": ({"stop": [5]}, 400, "stop.0"),
    "stop token out of the vocabulary": ({"stop_token_ids": [9999]}, 400, "stop_token_ids"),
    "too many stop tokens": ({"stop_token_ids": [1] * 129}, 400, "stop_token_ids"),
    "too many logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "logprobs as truth": ({"logprobs": True}, 400, "logprobs"),
    "bias of a word": ({"logit_bias": {"word": 1}}, 400, "logit_bias"),
    "bias out of the vocabulary": ({"logit_bias": {"9999": 1}}, 400, "logit_bias"),
    "bias too strong": ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    "bias of a list": ({"logit_bias": [1]}, 400, "logit_bias"),
    "too many biases": ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias"),
    "stream of a wrong type": ({"stream": "yes"}, 400, "stream"),
    "stream options without a stream": (
        {"stream_options": {"include_usage": True}},
        400,
        "stream_options",
    ),
    "suffix": ({"suffix": "end"}, 400, "suffix"),
    "guided decoding": ({"guided_regex": "a+"}, 400, "guided_regex"),
    "prompt embeddings": ({"prompt_embeds": "AAAA"}, 400, "prompt_embeds"),
    "unknown sparsity field": ({"sparsity": {"covrage": 0.9}}, 400, "sparsity.covrage"),
    "unknown policy": ({"sparsity": {"policy": "magic"}}, 400, "sparsity.policy"),
    "coverage over one": ({"sparsity": {"coverage": 1.2}}, 400, "sparsity.coverage"),
    "no coverage": ({"sparsity": {"coverage": 0}}, 400, "sparsity.coverage"),
    "no budget": ({"sparsity": {"max_keys": 0}}, 400, "sparsity.max_keys"),
    "contradicting budget": (
        {"sparsity": {"max_keys": 200, "min_keys": 300}},
        400,
        "sparsity.min_keys",
    ),
    "min_coverage": ({"sparsity": {"min_coverage": -1}}, 400, "sparsity.min_coverage"),
    "unknown pattern": ({"sparsity": {"pattern": "spiral:3"}}, 400, "sparsity.pattern"),
    "pattern of a wrong type": ({"sparsity": {"pattern": 3}}, 400, "sparsity.pattern"),
    "priority as text": ({"priority": "1"}, 400, "priority"),
    "priority out of bounds": ({"priority": -101}, 400, "priority"),
    "brownout of a wrong type": (
        {"sparsity": {"allow_brownout": 1}},
        400,
        "sparsity.allow_brownout",
    ),
    "sparsity of a wrong type": ({"sparsity": "dense"}, 400, "sparsity"),
}

BAD_CHATS = {
    "unknown model": ({"model": "gpt-4"}, 404, "model"),
    "no messages": ({"messages": []}, 400, "messages"),
    "messages of a wrong type": ({"messages": "hi"}, 400, "messages"),
    "too many messages": ({"messages": CHAT * 4097}, 400, "messages"),
    "message without content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages.0.content",
    ),
    "conversation longer than the limit": (
        {"messages": [{"role": "user", "content": "x" * 600}]},
        400,
        "messages",
    ),
    "no tokens asked for": ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    "answer longer than the limit": ({"max_completion_tokens": 511}, 400, "max_completion_tokens"),
    "logprobs as a number": ({"logprobs": 2}, 400, "logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, 400, "top_logprobs"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "tool choice": ({"tool_choice": "required"}, 400, "tool_choice"),
    "functions": ({"functions": [{"name": "f"}]}, 400, "functions"),
    "response format": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "audio": ({"audio": {"voice": "x", "format": "wav"}}, 400, "audio"),
    "modalities": ({"modalities": ["text", "audio"]}, 400, "modalities"),
    "template in the request": ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    "template arguments": ({"chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
}


def refused(send, fields, status, param):
    """The client raises the error of `status`, and the message names the field."""
    with pytest.raises(openai.APIStatusError) as caught:
        send(extra_body=fields)
    error = caught.value
    assert error.status_code == status
    assert type(error) is {400: openai.BadRequestError, 404: openai.NotFoundError}[status]
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert param in error.body["message"]
    assert len(error.body["message"]) <= 600


@pytest.mark.parametrize("kind", BAD_COMPLETIONS)
def test_a_bad_completion_is_refused_by_field(client, kind):
    refused(lambda **extra: complete(client, **extra), *BAD_COMPLETIONS[kind])


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_a_bad_chat_is_refused_by_field(client, kind):
    refused(lambda **extra: chat(client, **extra), *BAD_CHATS[kind])


def test_a_bad_request_for_a_stream_is_a_status_too(client):
    refused(lambda **extra: complete(client, stream=True, **extra), {"n": 0}, 400, "n")


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "status", "words"),
    [
        ("POST", "/v1/completions", b"", "application/json", 400, "JSON"),
        ("POST", "/v1/completions", b"{", "application/json", 400, "JSON"),
        ("POST", "/v1/completions", b"[]", "application/json", 400, "object"),
        ("POST", "/v1/completions", b"{}", "text/plain", 400, "Content-Type"),
        ("POST", "/v1/completions", b"\xff{}", "application/json", 400, "UTF-8"),
        ("POST", "/v1/completions", b'{"a":' * 100_000, "application/json", 400, "deep"),
        ("POST", "/v1/completions", b'{"temperature": NaN}', "application/json", 400, "NaN"),
        ("POST", "/v1/completions", b'{"top_p": -Infinity}', "application/json", 400, "Infinity"),
        (
            "POST",
            "/v1/completions",
            b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
            "application/json",
            400,
            "temperature",
        ),
        (
            "POST",
            "/v1/completions",
            b'{"model": "tiny", "prompt": "\\ud800"}',
            "application/json",
            400,
            "surrogate",
        ),
        ("POST", "/v1/completions", b'{"prompt": "x"}', "application/json", 400, "model"),
        ("POST", "/v1/completions", b'{"model": "tiny"}', "application/json", 400, "prompt"),
        ("POST", "/v1/chat/completions", b'{"model": "tiny"}', "application/json", 400, "messages"),
        ("POST", "/tokenize", b"{}", "application/json", 400, "prompt"),
        ("POST", "/detokenize", b'{"tokens": [9999]}', "application/json", 400, "tokens"),
        ("POST", "/detokenize", b'{"tokens": "x"}', "application/json", 400, "tokens"),
        ("POST", "/v1/embeddings", b"{}", "application/json", 404, "/v1/embeddings"),
        ("GET", "/v1/completions", b"", "application/json", 405, "GET"),
        ("DELETE", "/v1/models", b"", "application/json", 405, "DELETE"),
    ],
)
def test_what_the_client_would_not_send_is_refused_too(
    server, method, path, content, kind, status, words
):
    response = httpx.request(method, server + path, content=content, headers={"content-type": kind})
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert len(response.content) < 2000
