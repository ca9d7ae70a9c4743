"""The bundled checkpoint as shipped: its size, its example, and what sparsity leaves of it."""

from __future__ import annotations

import json

import httpx
import pytest
import torch

from kernels.attention import Impl
from kernels.prefill import in_tiles
from service.api.app import create_app
from service.config import BUNDLED_CHECKPOINT, ServiceConfig
from service.engine.build import build_engine
from service.engine.sequence import TAIL
from tests.service.conftest import serving

EXAMPLE = json.loads((BUNDLED_CHECKPOINT / "example_request.json").read_text())


@pytest.fixture(scope="module")
def url():
    config = ServiceConfig(kv_cache_gib=0.5)
    engine = build_engine(config)
    engine.start()
    with serving(create_app(engine, config)) as url:
        yield url
    engine.stop()


def ask(url, policy):
    body = EXAMPLE | {"sparsity": {"policy": policy, "pattern": "sinks:16+window:512"}}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
    return answer["choices"][0]["message"]["content"], answer["sparsity"], answer["usage"]


def test_it_fits_in_25_megabytes():
    assert sum(file.stat().st_size for file in BUNDLED_CHECKPOINT.iterdir()) <= 25_000_000


def test_the_example_is_answered_right_by_a_tenth_of_the_keys(url):
    text, sparsity, usage = ask(url, "dynamic")
    assert EXAMPLE["metadata"]["answer"] in text
    assert sparsity["density"] <= 0.10
    # Before its tail the prompt is too short to be worth it, but in a CPU's tile registers.
    short = 2048 if in_tiles(torch.bfloat16, 128, Impl.NUMBA) else usage["prompt_tokens"] - TAIL
    assert sparsity["fallbacks"] == {"short_context": short}


def test_a_window_of_as_many_keys_loses_the_answer(url):
    text, sparsity, _ = ask(url, "fixed")
    assert EXAMPLE["metadata"]["answer"] not in text
    assert sparsity["keys_attended"] == 528
