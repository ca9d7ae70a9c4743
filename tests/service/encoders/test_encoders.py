"""The routes of an encoder: shapes, oracles, errors, overload, and that requests stay apart."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
import time
from contextlib import asynccontextmanager

import httpx
import pytest
import torch

from models.encoders.defaults import text_of
from service.config import ServiceConfig
from service.encoders.engine import EncoderEngine
from service.encoders.reads import Embed
from service.errors import EngineDeadError, OverloadedError, RequestError
from service.serving import application, build
from tests.service.conftest import serving

LONG = "The old man went to the sea, and the sea was calm. " * 6


@asynccontextmanager
async def client_of(folder, **changes):
    """A client of a running service."""
    config = ServiceConfig(model=folder, dtype="float32", device="cpu", **changes)
    engine = build(config)
    engine.start()
    transport = httpx.ASGITransport(application(engine, config), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            client.engine = engine
            yield client
    finally:
        engine.stop()


def ask(folder, *requests, **changes):
    """Answers to POST requests, in turn."""

    async def run():
        async with client_of(folder, **changes) as client:
            return [await client.post(path, json=body) for path, body in requests]

    return asyncio.run(run())


def oracle(folder, task, architecture):
    import transformers

    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("architecture", ["LongformerModel", "BigBirdForMaskedLM"])
def test_embeddings(architecture, pooling, encoder_folder):
    folder = encoder_folder(architecture)
    inputs = ["a sea", LONG, "b"]
    ids = [[0, 70, 71, 2], [0, 5, 2]]
    encoder = {"pooling": pooling}
    both, coded, as_ids, plain = ask(
        folder,
        ("/v1/embeddings", {"model": folder.name, "input": inputs}),
        ("/v1/embeddings", {"model": folder.name, "input": LONG, "encoding_format": "base64"}),
        ("/v1/embeddings", {"input": ids, "user": "someone"}),
        ("/v1/embeddings", {"input": ids[0]}),
        encoder=encoder,
    )
    found = both.json()
    assert [one["index"] for one in found["data"]] == [0, 1, 2]
    assert found["object"] == "list" and found["data"][0]["object"] == "embedding"
    tokens = sum(len(text) + 2 for text in inputs)
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    long = torch.tensor(found["data"][1]["embedding"])
    assert long.norm().item() == pytest.approx(1, abs=1e-5)
    raw = base64.b64decode(coded.json()["data"][0]["embedding"])
    torch.testing.assert_close(torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw)), long)
    assert as_ids.json()["data"][0] == plain.json()["data"][0]
    assert as_ids.json()["usage"]["prompt_tokens"] == 7

    import transformers

    base = architecture.replace("ForMaskedLM", "Model")
    model = getattr(transformers, base).from_pretrained(folder).eval()
    arguments = {"input_ids": torch.tensor(ids[:1])}
    if architecture == "LongformerModel":
        arguments["global_attention_mask"] = torch.tensor([[1, 0, 0, 0]])
    with torch.no_grad():
        states = model(**arguments).last_hidden_state[0]
    wanted = states[0] if pooling == "cls" else states.mean(0)
    wanted = torch.nn.functional.normalize(wanted, dim=0)
    torch.testing.assert_close(torch.tensor(plain.json()["data"][0]["embedding"]), wanted)


@pytest.mark.parametrize("family", ["Longformer", "BigBird"])
def test_classify(family, encoder_folder):
    architecture = f"{family}ForSequenceClassification"
    folder = encoder_folder(architecture, num_labels=3)
    (answer,) = ask(folder, ("/classify", {"model": folder.name, "input": ["a sea", "b"]}))
    found = answer.json()
    expected = oracle(folder, "text-classification", architecture)(["a sea", "b"], top_k=None)
    for one, rows in zip(found["data"], expected, strict=True):
        assert one["num_classes"] == 3
        assert one["label"] == rows[0]["label"]
        assert sorted(one["probs"], reverse=True) == pytest.approx(
            [row["score"] for row in rows], abs=1e-5
        )
    assert found["usage"]["total_tokens"] == 7 + 3


def test_classify_labels_that_do_not_exclude_each_other(encoder_folder):
    folder = encoder_folder(
        "BigBirdForSequenceClassification",
        num_labels=3,
        problem_type="multi_label_classification",
    )
    (answer,) = ask(folder, ("/classify", {"input": "a sea"}))
    probs = answer.json()["data"][0]["probs"]
    assert all(0 < one < 1 for one in probs) and abs(sum(probs) - 1) > 1e-3


@pytest.mark.parametrize("family", ["Longformer", "BigBird"])
def test_fill_mask(family, encoder_folder):
    architecture = f"{family}ForMaskedLM"
    folder = encoder_folder(architecture)
    one, several = "the <mask> man", ["a <mask><mask> sea", "<mask> b"]
    single, many, chosen = ask(
        folder,
        ("/fill-mask", {"inputs": one}),
        ("/fill-mask", {"inputs": several, "parameters": {"top_k": 2}}),
        ("/fill-mask", {"inputs": one, "parameters": {"targets": ["x", "yz"]}}),
    )
    pipeline = oracle(folder, "fill-mask", architecture)
    close(single.json(), pipeline(one))
    close(many.json(), pipeline(several, top_k=2))
    close(chosen.json(), pipeline(one, targets=["x", "y"]))


def test_openai_s_client(encoder_folder):
    import openai

    config = ServiceConfig(model=encoder_folder("LongformerModel"), dtype="float32", device="cpu")
    engine = build(config)
    engine.start()
    try:
        with serving(application(engine, config)) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            name = client.models.list().data[0].id
            # It asks for base64 by itself, and decodes it.
            coded = client.embeddings.create(model=name, input=["a sea", "b"])
            plain = client.embeddings.create(
                model=name, input=["a sea", "b"], encoding_format="float"
            )
            for one, other in zip(coded.data, plain.data, strict=True):
                assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
            with pytest.raises(openai.NotFoundError, match="generates no text"):
                client.completions.create(model=name, prompt="a")
    finally:
        engine.stop()


def close(found, expected):
    """The same, but for rounding."""
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            close(one, other)
        return
    assert {**found, "score": 0} == {**expected, "score": 0}
    assert found["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.parametrize("family", ["Longformer", "BigBird"])
@pytest.mark.parametrize("none", [False, True])
def test_question_answering(family, none, encoder_folder):
    architecture = f"{family}ForQuestionAnswering"
    folder = encoder_folder(architecture)
    context = "It was calm. The old man went to the sea."
    given = {"top_k": 4, "max_answer_len": 9, "handle_impossible_answer": none}
    inputs = {"question": "Who went?", "context": context}
    several, one = ask(
        folder,
        ("/question-answering", {"inputs": inputs, "parameters": given}),
        ("/question-answering", inputs),
    )
    tokens, model = spans_by_hand(folder, architecture, inputs["question"], context)
    expected = best_spans(tokens, model, context, none, 9)[:4]
    for found, (score, begin, end) in zip(several.json(), expected, strict=True):
        assert found["score"] == pytest.approx(score, abs=1e-5)
        assert (found["start"], found["end"]) == (begin, end)
        assert found["answer"] == context[begin:end]
    assert set(one.json()) == {"score", "start", "end", "answer"}


def spans_by_hand(folder, architecture, question, context):
    """Offsets of tokens, and probabilities of transformers' model over context and first token."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found = tokenizer(question, context, return_offsets_mapping=True)
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    with torch.no_grad():
        scores = model(torch.tensor([found["input_ids"]]))
    inside = [part == 1 for part in found.sequence_ids()]
    counted = torch.tensor([True, *inside[1:]])
    pair = [
        one[0].masked_fill(~counted, -torch.inf).softmax(0)
        for one in (scores.start_logits, scores.end_logits)
    ]
    return list(zip(found["offset_mapping"], inside, strict=True)), pair


def best_spans(tokens, pair, context, none, longest):
    starts, ends = (one.tolist() for one in pair)
    spans = [
        (starts[i] * ends[j], tokens[i][0][0], tokens[j][0][1])
        for i in range(len(tokens))
        for j in range(i, min(i + longest, len(tokens)))
        if tokens[i][1] and tokens[j][1]
    ]
    return sorted([*spans, *([(starts[0] * ends[0], 0, 0)] if none else [])], reverse=True)


@pytest.mark.parametrize(
    ("path", "body", "status", "match"),
    [
        ("/v1/embeddings", {"input": "x" * 700}, 400, "has 702 tokens .* at most 600"),
        ("/v1/embeddings", {"input": [[5, 300]]}, 400, "0 to 260"),
        ("/v1/embeddings", {"input": ["a", ""]}, 400, "no text may be empty"),
        ("/v1/embeddings", {"input": []}, 400, "a string"),
        ("/v1/embeddings", {"input": ["a"] * 200}, 400, "at most 128"),
        ("/v1/embeddings", {"input": "a", "dimensions": 16}, 400, "have 32 numbers"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "is not served here"),
        ("/v1/embeddings", {"input": "a", "global_tokens": [3]}, 400, "0 to 2"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "base64"),
        ("/fill-mask", {"inputs": "a"}, 400, "write <mask> where"),
        ("/fill-mask", {"inputs": 5}, 400, "inputs"),
        ("/classify", {"input": "a"}, 404, "LongformerForMaskedLM; use /fill-mask"),
        ("/question-answering", {"input": "a"}, 404, "LongformerForMaskedLM"),
        ("/v1/completions", {"prompt": "a"}, 404, "generates no text"),
        ("/v1/chat/completions", {}, 404, "generates no text"),
        ("/nothing", {}, 404, "there is nothing"),
    ],
)
def test_bad_requests(path, body, status, match, encoder_folder):
    import re

    bad, good = ask(
        encoder_folder("LongformerForMaskedLM"), (path, body), ("/v1/embeddings", {"input": "a"})
    )
    assert bad.status_code == status
    assert re.search(match, bad.json()["error"]["message"])
    assert good.status_code == 200


def test_bigbird_takes_no_global_tokens(encoder_folder):
    (answer,) = ask(
        encoder_folder("BigBirdModel"), ("/v1/embeddings", {"input": "a", "global_tokens": [0]})
    )
    assert answer.status_code == 400
    assert "first and last block" in answer.json()["error"]["message"]


def test_about_the_service(encoder_folder):
    folder = encoder_folder("LongformerModel")

    async def run():
        async with client_of(folder, served_model_name="tiny") as client:
            await client.post("/v1/embeddings", json={"input": ["a", "bc"]})
            tokens = await client.post("/tokenize", json={"prompt": "ab"})
            found = [await client.get(f"/{x}") for x in ("v1/models", "health", "metrics")]
            return tokens.json(), *found

    tokens, models, health, metrics = asyncio.run(run())
    assert (tokens["count"], tokens["max_model_len"]) == (4, 600)
    assert models.json()["data"][0]["id"] == "tiny"
    assert models.json()["data"][0]["max_model_len"] == 600
    assert health.json()["status"] == "ok"
    assert 'saccade_prompt_tokens_total{model_name="tiny"} 7.0' in metrics.text
    assert 'request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in metrics.text


def test_a_decoder_says_that_it_is_none(engine, service_config):
    async def run():
        transport = httpx.ASGITransport(application(engine, service_config))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                await client.post(path, json={"input": "a"})
                for path in ("/v1/embeddings", "/classify", "/fill-mask", "/question-answering")
            ]

    for answer in asyncio.run(run()):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_offered"
        assert "is a decoder" in answer.json()["error"]["message"]


class Held:
    """A read that waits until it is let go."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, encoder, text, hidden):
        self.begun.set()
        assert self.go.wait(30)
        return "held"


@pytest.fixture
def running(encoder_folder):
    """Factory of running engines, which are stopped at the end."""
    started = []

    def start(**changes):
        folder = encoder_folder("LongformerModel")
        engine = build(ServiceConfig(model=folder, dtype="float32", device="cpu", **changes))
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


def texts(engine, *lengths):
    return [text_of(engine.config, [5] * length) for length in lengths]


def test_overload_and_every_request_has_one_end(running, encoder_folder):
    engine = running(max_num_seqs=1, max_queue=2)
    assert isinstance(engine, EncoderEngine)
    held = Held()
    (first,) = engine.submit(texts(engine, 3), [held])
    assert held.begun.wait(30)
    embed = Embed("mean", normalize=True)
    waiting = engine.submit(texts(engine, 3, 4), [embed] * 2)
    load = engine.load()
    assert (load.queued_prompts, load.kv_usage, load.slots) == (3, 0.0, 1.0)
    assert load.queued_tokens == sum(len(text.ids) for text in texts(engine, 3, 3, 4))
    with pytest.raises(OverloadedError, match="full"):
        engine.submit(texts(engine, 3), [embed])
    with pytest.raises(RequestError, match="more than the 3"):
        engine.submit(texts(engine, 3, 3, 3, 3), [embed] * 4)
    assert waiting[1].cancel()
    held.go.set()
    assert first.result(30) == "held"
    assert waiting[0].result(30).shape == (32,)
    assert engine.load().prefill_seconds > 0
    held = Held()
    (last,) = engine.submit(texts(engine, 3), [held])
    assert held.begun.wait(30)
    (late,) = engine.submit(texts(engine, 3), [embed])
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while not engine._stopping:
        time.sleep(0.001)
    held.go.set()
    stopping.join(30)
    assert last.result(30) == "held"
    with pytest.raises(EngineDeadError, match="shutting down"):
        late.result(30)
    with pytest.raises(EngineDeadError):
        engine.submit(texts(engine, 3), [embed])
    assert not engine.health().alive


def test_overload_over_http(encoder_folder):
    async def run():
        folder = encoder_folder("LongformerModel")
        async with client_of(folder, max_num_seqs=1, max_queue=1) as client:
            held = Held()
            client.engine.submit(texts(client.engine, 3), [held])
            await asyncio.to_thread(held.begun.wait, 30)
            body = {"input": "a"}
            waiting = asyncio.create_task(client.post("/v1/embeddings", json=body))
            while not client.engine._waiting:
                await asyncio.sleep(0.001)
            refused = await client.post("/v1/embeddings", json=body)
            held.go.set()
            return await waiting, refused

    answered, refused = asyncio.run(run())
    assert answered.status_code == 200
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


def test_one_that_fails_harms_no_other(running, monkeypatch):
    engine = running()
    run = engine._encoder.hidden
    sizes = []

    def hidden(packed):
        sizes.append(len(packed.texts))
        if any(len(text.ids) == 13 for text in packed.texts):
            raise RuntimeError("no luck")
        states = run(packed)
        for text, part in zip(packed.texts, packed.slices(), strict=True):
            if len(text.ids) == 17:
                states[part] = torch.nan
        return states

    monkeypatch.setattr(engine._encoder, "hidden", hidden)
    held = Held()
    engine.submit(texts(engine, 3), [held])
    assert held.begun.wait(30)

    def broken(encoder, text, states):
        raise ValueError("a bad read")

    embed = Embed("mean", normalize=True)
    futures = engine.submit(texts(engine, 5, 13, 17, 6, 7), [embed, embed, embed, broken, embed])
    held.go.set()
    assert futures[0].result(30).shape == futures[4].result(30).shape == (32,)
    for future, match in zip(futures[1:4], ("no luck", "not finite", "a bad read"), strict=True):
        with pytest.raises(Exception, match=match):
            future.result(30)
    assert sizes == [1, 5, 1, 1, 1, 1, 1]
    assert engine.health().alive


def test_batches_have_few_tokens(running, monkeypatch):
    engine = running(max_step_tokens=100)
    run = engine._encoder.hidden
    batches = []

    def hidden(packed):
        batches.append([len(text.ids) for text in packed.texts])
        return run(packed)

    monkeypatch.setattr(engine._encoder, "hidden", hidden)
    held = Held()
    engine.submit(texts(engine, 3), [held])
    assert held.begun.wait(30)
    embed = Embed("mean", normalize=False)
    futures = engine.submit(texts(engine, 60, 40, 1, 200, 50, 50), [embed] * 6)
    held.go.set()
    for future in futures:
        future.result(30)
    assert batches == [[3], [60, 40], [1], [200], [50, 50]]


def test_many_clients_at_once(encoder_folder):
    async def run():
        async with client_of(encoder_folder("BigBirdModel"), max_num_seqs=4) as client:
            bodies = [{"input": LONG[: 20 * number]} for number in range(1, 13)]
            alone = [await client.post("/v1/embeddings", json=body) for body in bodies]
            many = await asyncio.gather(
                *(client.post("/v1/embeddings", json=body) for body in bodies)
            )
            return alone, many

    for one, other in zip(*asyncio.run(run()), strict=True):
        first, second = (torch.tensor(x.json()["data"][0]["embedding"]) for x in (one, other))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
