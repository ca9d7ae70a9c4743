"""Tiny random checkpoints, engines over them, and a server on a port of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tokenizers
import torch
import uvicorn
import yaml
from safetensors.torch import save_file

from kernels.attention import Impl
from kernels.cache import LayerCache
from models.config import ModelConfig
from models.decoder import Decoder
from models.graph import CapturedSteps
from service.api.app import create_app
from service.config import ServiceConfig
from service.engine.build import build_engine
from service.engine.engine import Engine
from service.engine.pages import PagePool
from service.engine.replay import Replays
from service.engine.runner import Runner
from service.engine.scheduler import Limits
from service.metrics import Metrics
from tests.ports import free_port
from tests.service.engine.tiny import Harness, letters, make_decoder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 256 + len(SPECIAL)
MAX_MODEL_LEN = 512


def write_checkpoint(folder, max_model_len=MAX_MODEL_LEN):
    """A Llama of two layers and bytes as tokens, whose greedy text is printable ASCII."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|begin|>",
                "eos_token": "<|end|>",
                "add_bos_token": True,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": max_model_len,
                "rms_norm_eps": 1e-6,
                "bos_token_id": 256,
                "eos_token_id": 257,
                "torch_dtype": "float32",
            }
        )
    )
    decoder = Decoder(ModelConfig.from_folder(folder), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = noise * 0.3 if parameter.dim() > 1 else 1.0 + 0.1 * noise
    printable = [index for letter, index in vocab.items() if letter.isascii()]
    silent = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    silent[printable] = False
    weights["lm_head.weight"][silent] = 0.0
    save_file(weights, folder / "model.safetensors")
    return folder


def saccade(*arguments, python_path=ROOT, **options):
    """Start the command in an interpreter of its own."""
    environment = os.environ | {"PYTHONPATH": str(python_path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "service.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@contextmanager
def serving(app):
    """Serve `app` with uvicorn in a thread; gives the base URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of the tiny checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def service_config(checkpoint):
    """A configuration for the tiny checkpoint."""
    return ServiceConfig(
        model=checkpoint,
        dtype="float32",
        kv_cache_gib=0.01,
        max_num_seqs=4,
        sparsity={"dense_below": 16, "min_keys": 16, "max_keys": 160},
    )


@pytest.fixture(scope="session")
def engine(service_config):
    """A running engine over the tiny checkpoint."""
    engine = build_engine(service_config)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def server(engine, service_config):
    """Base URL of the application over the real engine."""
    with serving(create_app(engine, service_config)) as url:
        yield url


@pytest.fixture
def port():
    """A port for a service: `free_port`."""
    return free_port()


@pytest.fixture
def tiny_file(tmp_path):
    """A configuration file for the tiny checkpoint."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"dtype": "float32", "kv_cache_gib": 0.01, "max_num_seqs": 4}))
    return file


@pytest.fixture
def harness():
    """Factory of running engines; all are stopped at the end."""
    started = []

    def start(
        *,
        dtype=torch.float64,
        pages=400,
        max_seqs=8,
        max_queue=64,
        prefill_chunk=512,
        step_tokens=1024,
        dense_below=0,
        prefill_dense_below=0,
        seed=0,
        config=None,
        wrap=lambda model: model,
        max_model_len=4096,
        captured=(),
        prefix_cache=True,
        impl=Impl.TORCH,
        device="cpu",
        brownout=None,
    ):
        config = config or tiny_config()
        decoder = make_decoder(dtype, seed, config, impl, device)
        caches = [
            LayerCache.allocate(pages, config.kv_heads, config.head_dim, dtype, device)
            for _ in range(config.layers)
        ]
        metrics = Metrics("tiny")
        shape = config.heads, config.windows
        replays = None
        if captured:
            steps = CapturedSteps(decoder, caches, captured)
            replays = Replays(steps, torch.device(device), *shape, metrics)
        runner = Runner(wrap(decoder), caches, *shape, metrics, replays=replays)
        engine = Engine(
            runner,
            config,
            letters(),
            metrics,
            pool=PagePool(pages),
            limits=Limits(max_seqs, max_queue, prefill_chunk, step_tokens),
            model_name="tiny",
            max_model_len=min(max_model_len, pages * 64),
            dense_below=dense_below,
            prefill_dense_below=prefill_dense_below,
            prefix_cache=prefix_cache,
            brownout=brownout,
        )
        engine.start()
        started.append(engine)
        return Harness(engine, runner, decoder)

    yield start
    for engine in started:
        engine.stop()
