"""Greedy answers over HTTP of decoders that are not Llama's kin, under every policy."""

from __future__ import annotations

import httpx
import pytest
import tokenizers
import torch

from models.loader import load
from service.api.app import create_app
from service.config import ServiceConfig
from service.engine.build import build_engine
from tests.models.test_decoder import one_shot
from tests.models.test_sparse_transformer import write
from tests.service.conftest import serving

VOCAB = 128
PROMPT = torch.randint(1, VOCAB, (900,), generator=torch.Generator().manual_seed(3)).tolist()
ANSWER = 12
EVERY = {"coverage": 1.0, "min_keys": 4096, "max_keys": 4096}


def write_tokenizer(folder):
    """One token a character: token i is the character U+0100 + i."""
    vocab = {chr(0x100 + i): i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=chr(0x100)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))


def write_bloom(folder):
    import transformers

    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3
    )
    torch.manual_seed(1)
    transformers.BloomForCausalLM(config).save_pretrained(folder)


def write_sparse_transformer(folder):
    write(folder, max_position_embeddings=1024, patterns=[["window:32", "strided:32"]])


def greedy(folder):
    """The answer by whole passes over all tokens, in float64."""
    decoder, _ = load(folder, dtype="float64")
    tokens = list(PROMPT)
    for _ in range(ANSWER):
        tokens.append(int(one_shot(decoder, tokens)[-1].argmax()))
    return text_of(tokens[len(PROMPT) :])


def text_of(tokens):
    return "".join(chr(0x100 + token) for token in tokens)


@pytest.fixture(scope="module", params=[write_bloom, write_sparse_transformer])
def served(request, tmp_path_factory):
    """The family, the expected answer, and how to ask for one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    request.param(folder)
    write_tokenizer(folder)
    config = ServiceConfig(
        model=folder,
        dtype="float32",
        kv_cache_gib=0.02,
        max_num_seqs=4,
        max_model_len=1000,
        prefill_chunk=200,
        sparsity={"dense_below": 0, "prefill_dense_below": 0},
    )
    engine = build_engine(config)
    engine.start()
    with serving(create_app(engine, config)) as url:

        def ask(**sparsity):
            body = {
                "model": folder.name,
                "prompt": text_of(PROMPT),
                "max_tokens": ANSWER,
                "temperature": 0,
                "ignore_eos": True,
                "sparsity": sparsity,
            }
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"], answer.json()["sparsity"]

        yield request.param, greedy(folder), ask
    engine.stop()


def test_dense_is_the_models_own_answer(served):
    _, expected, ask = served
    text, report = ask(policy="dense")
    assert text == expected
    assert report["density"] == report["coverage"] == 1.0
    assert report["prefill"] == {"policy": "dense", "density": 1.0, "coverage": 1.0}
    patterned = served[0] is write_sparse_transformer
    assert report["keys_attended"] < 50 if patterned else report["keys_attended"] > 700


def test_everything_selected_is_the_same_answer(served):
    family, expected, ask = served
    text, report = ask(policy="dynamic", prefill="dynamic", prefill_coverage=1.0, **EVERY)
    assert text == expected
    assert report["coverage"] == pytest.approx(1.0, abs=1e-5)
    assert report["density"] == report["prefill"]["density"] == 1.0
    if family is write_sparse_transformer:  # the prompt, and all of the answer but its last token
        assert report["fallbacks"] == {"own_pattern": len(PROMPT) + ANSWER - 1}
    else:
        assert report["fallbacks"] == {}


def test_a_pattern_that_shows_everything_is_the_same_answer(served):
    _, expected, ask = served
    text, report = ask(policy="fixed", prefill="fixed", pattern="window:2000")
    assert text == expected
    assert report["density"] == report["prefill"]["density"] == 1.0


def test_what_is_selected_is_reported(served):
    family, _, ask = served
    text, report = ask(policy="dynamic", prefill="dynamic", prefill_coverage=0.9)
    assert len(text) == ANSWER
    if family is write_bloom:
        assert report["fallbacks"] == {}
        assert 0.1 < report["density"] < 1.0
        assert 0.2 < report["prefill"]["density"] < 1.0
        assert 0.3 < report["coverage"] <= 1.0
        assert 0.3 < report["prefill"]["coverage"] <= 1.0


def test_a_fixed_pattern_is_reported(served):
    _, _, ask = served
    text, report = ask(policy="fixed", prefill="fixed", pattern="sinks:2+window:20")
    assert len(text) == ANSWER
    assert report["prefill"]["coverage"] is None
    assert 0.0 < report["density"] < 0.6
    assert 0.0 < report["coverage"] < 1.0
    assert 0.0 < report["prefill"]["density"] < 0.6
    assert report["keys_attended"] <= 22
