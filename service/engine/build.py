"""From a configuration to an engine that is ready to start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from kernels import dynamic, judge
from kernels.attention import Impl, dense_decode, selected_attention
from kernels.cache import LayerCache, Rows, Segment
from kernels.page import PAGE
from kernels.policy import Dynamic, Pages
from kernels.prefill import choose, in_tiles, tile_attention
from models.config import ModelConfig
from models.graph import CapturedSteps
from models.loader import load
from models.tokenizer import Tokenizer
from models.wave import in_waves, parts_of
from service.engine.buckets import buckets
from service.engine.engine import Engine
from service.engine.pages import PagePool
from service.engine.replay import Replays
from service.engine.runner import Runner
from service.engine.scheduler import Limits
from service.engine.sequence import TAIL
from service.errors import ConfigError
from service.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.decoder import Decoder
    from service.config import ServiceConfig


_log = logging.getLogger("saccade.engine")


def check_config(config: ServiceConfig) -> int:
    """Everything that can be known to be wrong before the weights are read.

    Returns:
        The length limit to serve with, tokens.

    Raises:
        ConfigError: the numbers contradict each other.
        ModelError: the checkpoint's config.json cannot be served.
    """
    model = ModelConfig.from_folder(config.model)
    least = config.max_num_seqs + TAIL
    if config.max_step_tokens < least:
        raise ConfigError(
            f"invalid configuration: max_step_tokens must be at least max_num_seqs + {TAIL} = "
            f"{least}, not {config.max_step_tokens}"
        )
    return model.resolve_max_model_len(config.max_model_len)


def build_engine(config: ServiceConfig) -> Engine:
    """Load the model and lay out its cache; the caller starts the engine.

    Raises:
        ConfigError: the numbers contradict each other.
        ModelError: the checkpoint cannot be loaded.
    """
    wanted_len = check_config(config)
    device = torch.device(device_name(config.device))
    if device.type == "cuda" and device.index is None:  # torch wants a number in some places
        device = torch.device("cuda", 0)
    decoder, model = load(config.model, config.dtype, device, config.load_format)
    dtype = decoder.model.embed_tokens.weight.dtype
    page_bytes = model.layers * LayerCache.bytes_per_page(model.kv_heads, model.head_dim, dtype)
    pages = int(config.kv_cache_gib * 2**30 // page_bytes)
    max_model_len = min(wanted_len, pages * PAGE)
    # A limit that was asked for is kept or refused; the checkpoint's own gives way to memory.
    if max_model_len < (config.max_model_len or TAIL):
        need = -(-(config.max_model_len or TAIL) // PAGE) * page_bytes / 2**30
        raise ConfigError(
            f"invalid configuration: kv_cache_gib {config.kv_cache_gib:g} holds {pages * PAGE} "
            f"tokens; raise it to at least {need:.3g} or lower max_model_len"
        )
    try:
        caches = [
            LayerCache.allocate(pages, model.kv_heads, model.head_dim, dtype, device)
            for _ in range(model.layers)
        ]
    except RuntimeError:  # torch.OutOfMemoryError is one too
        raise ConfigError(
            f"invalid configuration: kv_cache_gib {config.kv_cache_gib:g} is more memory than "
            f"{device} has to give; lower it"
        ) from None
    warm_up(model, dtype, device, decoder.impl)
    metrics = Metrics(config.model_name)
    metrics.attention_backend(decoder.impl)
    if decoder.impl is Impl.TORCH:
        _log.warning(
            "no fast kernel takes %d heads of %d channels over %d KV heads in %s on %s: attention "
            "runs in torch's operations, as exactly and more slowly",
            *(model.heads, model.head_dim, model.kv_heads, dtype, device),
        )
    replays = None
    if config.cuda_graphs and decoder.impl is Impl.TRITON and not decoder.fused:
        _log.warning("decode steps of %s are launched kernel by kernel", model.architecture)
    elif config.cuda_graphs and decoder.impl is Impl.TRITON:
        replays = capture(config, decoder, caches, max_model_len, metrics)
    runs = in_waves(decoder)
    parts = parts_of(runs)
    return Engine(
        Runner(runs, caches, model.heads, model.windows, metrics, replays=replays),
        model,
        Tokenizer.from_folder(config.model),
        metrics,
        pool=PagePool(pages),
        limits=Limits(
            max_seqs=config.max_num_seqs,
            max_queue=config.max_queue,
            prefill_chunk=parts * config.prefill_chunk,
            step_tokens=parts * config.max_step_tokens,
        ),
        model_name=config.model_name,
        max_model_len=max_model_len,
        dense_below=config.sparsity.dense_below_on(device.type),
        prefill_dense_below=config.sparsity.prefill_dense_below_on(
            device.type,
            tiles=model.slopes is None and in_tiles(dtype, model.head_dim, decoder.impl),
        ),
        prefix_cache=config.prefix_cache,
        brownout=config.brownout.controller(config.sparsity.resolve().max_keys),
    )


def capture(
    config: ServiceConfig,
    decoder: Decoder,
    caches: Sequence[LayerCache],
    max_model_len: int,
    metrics: Metrics,
) -> Replays:
    """Capture the decode steps that the service will mostly run, as far as that goes."""
    sparsity, kv, model = config.sparsity.resolve(), caches[0].kv, decoder.config
    wanted = buckets(
        dynamic=sparsity.sampled,
        dense_layers=sparsity.dense_layers,
        max_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        cache_pages=kv.shape[1],
        dense_below=config.sparsity.dense_below_on(kv.device.type),
    )
    steps = CapturedSteps(decoder, caches, wanted)
    metrics.graphs_failed("capture", steps.failed)
    return Replays(steps, kv.device, model.heads, model.windows, metrics)


def warm_up(model: ModelConfig, dtype: torch.dtype, device: torch.device, impl: Impl) -> None:
    """Select and attend once: most of what is compiled at its first use no request waits for.

    Triton's launches go to the thread's current device, which is this one from here on.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cache = LayerCache.allocate(4, model.kv_heads, model.head_dim, dtype, device)
    pages = torch.arange(4, device=device)
    cache.code(pages)
    lengths = pages[:1] + 4 * PAGE
    rows = Rows(pages[None], lengths, lengths - lengths)
    query = torch.ones(1, model.heads, model.head_dim, dtype=dtype, device=device)
    for policy in (Dynamic(), Dynamic(sampled=False)):
        selection = dynamic.select(query, cache, rows, policy, 1.0, impl=impl)
        _, lse, own = selected_attention(query, cache, rows, selection, 1.0, impl)
        judge.estimated_coverage(query, cache, rows, selection, lse, own, 1.0, impl)
    dense_decode(query, cache, rows, 1.0, impl)
    if in_tiles(dtype, model.head_dim, impl):
        segment = Segment.of(pages.tolist(), 4 * PAGE - 1, 1, device)
        lists = choose(query, cache, segment, Pages().least, 1.0, impl)
        tile_attention(query, cache, segment, lists, 1.0, impl)


def device_name(name: str) -> str:
    """The device that a configuration's `device` means on this machine."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def machine_name(device: torch.device) -> str:
    """What results say they were made on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
