"""`saccade bench engine --prompt`: a model's whole prompt, chunk by chunk, sparse and dense."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels.cache import LayerCache, Segment
from kernels.page import PAGE
from kernels.policy import Pages
from models.attention import Recorder
from models.loader import dummy
from models.step import DenseGroup, StepInput, TileGroup
from models.wave import in_waves, parts_of
from service.bench.clock import seconds_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.config import ModelConfig
    from models.decoder import Decoder
    from models.wave import Wave


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """Medians of one prompt under one policy."""

    tokens: int
    chunk: int
    policy: str
    density: float  # keys read over keys visible, mean over layers, KV heads and tokens
    seconds: float  # up to the first token's logits
    dense_s: float
    ratio: float  # dense over this, median of the paired ratios
    floor_s: float | None  # dense: the linear layers alone, and cuDNN's causal attention
    floor_share: float | None  # of the floor in the time; dense only


def measure(
    config: ModelConfig,
    tokens: int,
    chunk: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[PromptRecord]:
    """Time a prompt of random tokens, dense and dynamic turn by turn.

    Args:
        config: shape of the model; its weights are small random numbers, so attention is level.
        tokens: of the prompt, a multiple of `chunk`.
        chunk: tokens a step, a multiple of 64.
        device: where.
        dtype: of weights and cache.
        repeats: turns, behind one that warms up.
    """
    with torch.inference_mode():
        decoder = dummy(config, dtype, device)
        ids = torch.randint(config.vocab_size, (tokens,), device=device)
        floor = _floor(decoder, tokens, chunk, device, dtype) if device.type == "cuda" else None
        return compare(decoder, ids, chunk, repeats, floor=floor)


def compare(
    decoder: Decoder,
    ids: torch.Tensor,
    chunk: int,
    repeats: int,
    dense_below: int = 0,
    floor: float | None = None,
) -> list[PromptRecord]:
    """Time a prompt, dense and dynamic turn by turn.

    Args:
        decoder: the model.
        ids: int64 [tokens], a multiple of `chunk` of them.
        chunk: tokens a step, a multiple of 64; so many a core where a CPU's share a step.
        repeats: turns, behind one that warms up.
        dense_below: position up to which the dynamic prompt is dense, a multiple of `chunk`.
        floor: seconds that a dense prompt takes at the least, if they are known.
    """
    config, tokens, device = decoder.config, len(ids), ids.device
    dtype = decoder.model.embed_tokens.weight.dtype
    with torch.inference_mode():
        caches = [
            LayerCache.allocate(tokens // PAGE, config.kv_heads, config.head_dim, dtype, device)
            for _ in range(config.layers)
        ]
        model = in_waves(decoder)
        chunk *= parts_of(model)
        names, densities = ("dense", "dynamic"), {"dense": 1.0}
        turns: dict[str, list[float]] = {name: [] for name in names}
        for turn in tqdm(range(repeats + 1), unit="turn", desc=f"{tokens} tokens"):
            for name in names:
                notes: list[torch.Tensor] = []
                sparse_from = tokens if name == "dense" else dense_below
                way = partial(_run, model, caches, ids, chunk, sparse_from, notes)
                seconds = seconds_of(way, device)
                if turn:
                    turns[name].append(seconds)
                if notes:
                    densities[name] = float(torch.stack(notes).mean())
    dense = statistics.median(turns["dense"])
    return [
        PromptRecord(
            tokens=tokens,
            chunk=chunk,
            policy=name,
            density=densities[name],
            seconds=statistics.median(turns[name]),
            dense_s=dense,
            ratio=statistics.median(
                one / other for one, other in zip(turns["dense"], turns[name], strict=True)
            ),
            floor_s=floor if name == "dense" else None,
            floor_share=floor / dense if floor is not None and name == "dense" else None,
        )
        for name in names
    ]


def table(records: list[PromptRecord]) -> str:
    """The records as text."""
    lines = [f"{'prompt':>8} {'policy':<8} {'density':>8} {'first token':>12} {'dense / this':>12}"]
    for r in records:
        floor = "" if r.floor_share is None else f"  {r.floor_share:.0%} of it the floor"
        lines.append(
            f"{r.tokens:>8} {r.policy:<8} {r.density:>8.2%} {r.seconds:>10.2f} s "
            f"{r.ratio:>12.2f}{floor}"
        )
    return "\n".join(lines)


def _run(
    model: Decoder | Wave,
    caches: list[LayerCache],
    ids: torch.Tensor,
    chunk: int,
    sparse_from: int,
    notes: list[torch.Tensor],
) -> None:
    """The prompt, and the logits behind it; `notes` takes each sparse chunk's layers' densities."""
    for step in _steps(ids, chunk, sparse_from):
        recorder = Recorder()
        hidden = model(step, caches, recorder)
        notes += [entry.density.mean() for entry in recorder.tiles]
    model.logits(hidden[-1:])


def _steps(ids: torch.Tensor, chunk: int, sparse_from: int) -> Iterator[StepInput]:
    device, table = ids.device, list(range(len(ids) // PAGE))
    for start in range(0, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        position = torch.arange(start, stop, device=device)
        segment = Segment.of(table, start, stop - start, device)
        dense = start < sparse_from
        yield StepInput(
            token_ids=ids[start:stop],
            positions=position,
            slots=position,
            filled=torch.arange(start // PAGE, stop // PAGE, device=device),
            dense=(DenseGroup(segment, 0),) if dense else (),
            alone=None,
            sparse=(),
            tiled=() if dense else (TileGroup(segment, 0, Pages()),),
        )


def _floor(
    decoder: Decoder, tokens: int, chunk: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of the linear layers alone, and of cuDNN's causal attention over the whole prompt."""
    config = decoder.config
    weights = [
        weight
        for name, weight in decoder.named_parameters()
        if weight.dim() == 2 and "layers" in name
    ]
    inputs = {
        size: torch.randn(chunk, size, device=device, dtype=dtype)
        for size in {weight.shape[1] for weight in weights}
    }

    def linear() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, count, tokens, config.head_dim, device=device, dtype=dtype)

    query, keys, values = heads(config.heads), heads(config.kv_heads), heads(config.kv_heads)

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    for way in (linear, attend):
        way()
    times = [
        statistics.median(seconds_of(way, device) for _ in range(5)) for way in (linear, attend)
    ]
    return times[0] * tokens / chunk + times[1] * config.layers
