"""Factory of running engines on a tiny random decoder."""

from __future__ import annotations

import pytest
import torch

from kernels.cache import LayerCache
from service.engine.engine import Engine
from service.engine.pages import PagePool
from service.engine.runner import Runner
from service.engine.scheduler import Limits
from service.metrics import Metrics
from tests.service.engine.tiny import Harness, letters, make_decoder, tiny_config


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
        seed=0,
        config=None,
        wrap=lambda model: model,
        max_model_len=4096,
    ):
        config = config or tiny_config()
        decoder = make_decoder(dtype, seed, config)
        caches = [
            LayerCache.allocate(pages, config.kv_heads, config.head_dim, dtype, "cpu")
            for _ in range(config.layers)
        ]
        metrics = Metrics("tiny")
        runner = Runner(wrap(decoder), caches, config.heads, config.windows, metrics)
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
        )
        engine.start()
        started.append(engine)
        return Harness(engine, runner, decoder)

    yield start
    for engine in started:
        engine.stop()
