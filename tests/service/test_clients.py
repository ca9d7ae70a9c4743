"""The requests of load generators and of lm-eval, as they send them, to the bundled model."""

from __future__ import annotations

import json

import httpx
import pytest
import torch
import transformers

from models.tokenizer import Tokenizer
from service.api.app import create_app
from service.config import BUNDLED_CHECKPOINT, ServiceConfig
from service.engine.build import build_engine
from tests.service.conftest import serving

MODEL = BUNDLED_CHECKPOINT.name
TEXTS = [
    ("The harbour was quiet, and Alice", " walked slowly to the old mill."),
    ("", "Nobody answered."),
    ("She put the letter on the table. " * 12 + "Then she took the", " lamp and went out"),
]


@pytest.fixture(scope="module")
def url():
    config = ServiceConfig(kv_cache_gib=0.2, dtype="float32")
    engine = build_engine(config)
    engine.start()
    with serving(create_app(engine, config)) as url:
        yield url
    engine.stop()


@pytest.fixture(scope="module")
def oracle():
    model = transformers.LlamaForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32)
    return model.eval()


def post(url, path, body):
    answer = httpx.post(url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(url, path, body):
    """The chunks of a stream that must end with [DONE]."""
    with httpx.stream("POST", url + path, json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def loglikelihoods(model, prompt, continuation):
    """What lm-eval takes from its own forward pass: the sum, and whether greedy says the same."""
    ids = torch.tensor([prompt + continuation])  # [1, tokens]
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)  # [tokens, vocabulary]
    rows = logprobs[len(prompt) - 1 : -1]  # [continuation, vocabulary]
    wanted = torch.tensor(continuation)
    total = rows.gather(1, wanted[:, None]).sum().item()
    return total, bool((rows.argmax(-1) == wanted).all())


def test_lm_evals_loglikelihoods_are_those_of_a_forward_pass(url, oracle):
    """Batched token ids with echo, as its `local-completions` sends and reads them."""
    tokenizer = Tokenizer.from_folder(BUNDLED_CHECKPOINT)
    bos = [tokenizer.bos_id]
    pairs = [
        (bos + tokenizer.encode(context, False), tokenizer.encode(text, False))
        for context, text in TEXTS
    ]
    # A continuation that greedy decoding gives.
    with torch.no_grad():
        made = oracle.generate(torch.tensor([pairs[0][0]]), max_new_tokens=6, do_sample=False)
    pairs.append((pairs[0][0], made[0, len(pairs[0][0]) :].tolist()))
    answer = post(
        url,
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": [prompt + continuation for prompt, continuation in pairs],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    )
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    greedy = []
    for choice, (prompt, continuation) in zip(choices, pairs, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + len(continuation) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        values = logprobs["token_logprobs"][len(prompt) : -1]
        tops = logprobs["top_logprobs"][len(prompt) : -1]
        total, is_greedy = loglikelihoods(oracle, prompt, continuation)
        assert sum(values) == pytest.approx(total, abs=1e-4)
        same = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        assert same == is_greedy
        greedy.append(same)
    assert set(greedy) == {True, False}


def test_lm_evals_generations(url):
    """A batch of texts to go on with until a string."""
    answer = post(
        url,
        "/v1/completions",
        {
            "prompt": ["The old man", "At the station"],
            "model": MODEL,
            "max_tokens": 12,
            "temperature": 0,
            "stop": ["\n\n", "<|eos|>"],
            "seed": 1234,
        },
    )
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1]
    assert all("\n\n" not in choice["text"] for choice in answer["choices"])


def test_its_tokenizer_is_the_one_of_the_folder(url):
    """lm-eval and the load generators count with transformers, from the folder."""
    theirs = transformers.AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    for _, text in TEXTS:
        ours = post(url, "/tokenize", {"prompt": text, "add_special_tokens": False})
        assert ours["tokens"] == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellms_requests(url, path):
    """It asks for /health and the models first, and wants usage with every chunk."""
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
    chat = "chat" in path
    asked = (
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Tell a story."}]}],
            "max_completion_tokens": 9,
        }
        if chat
        else {"prompt": "Tell a story.", "max_tokens": 9}
    )
    chunks = stream(
        url,
        path,
        asked
        | {
            "model": MODEL,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": True,
            "stop": None,
        },
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 9
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] > 0


def test_aiperfs_requests(url):
    """A chat whose messages are named, a stream with usage, and the metrics at the base URL."""
    chunks = stream(
        url,
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "name": "text", "content": "Tell a story."}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 7,
            "min_tokens": 7,
            "ignore_eos": True,
        },
    )
    assert chunks[-1]["usage"]["completion_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1]]
    assert any(texts)
    metrics = httpx.get(f"{url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "saccade_time_to_first_token_seconds_bucket" in metrics.text


def test_vllms_benchmarks_requests(url):
    chunks = stream(
        url,
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": "Tell a story.",
            "repetition_penalty": 1.0,
            "max_tokens": 5,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    )
    assert all("text" in chunk["choices"][0] for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 5
