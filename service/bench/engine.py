"""`saccade bench engine`: a model's whole decode step, dynamic against dense, in one run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from kernels.cache import LayerCache, Rows
from kernels.codes import words
from kernels.fingerprint import fingerprint
from kernels.page import PAGE
from kernels.policy import Dynamic
from models.decode_step import Bucket, DecodeStep
from models.graph import CapturedStep
from models.loader import dummy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from models.config import ModelConfig
    from models.decoder import Decoder
    from service.bench.cell import Cell

SLACK = 3 << 30
"""Bytes that a step and the coding of the cache take besides weights and cache, at most."""
CODED_AT_ONCE = 512
"""Pages: coding them takes a few hundred megabytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """Medians of one cell under one policy."""

    batch: int
    context: int
    policy: str
    keys: float  # read of each row, mean over layers and KV heads
    us: float  # microseconds a step
    bytes: int  # of weights and cache that a step reads at least
    dense_us: float
    ratio: float  # dense over this, median of the paired ratios
    tokens_per_s: float
    ceiling_share: float | None  # time that reading the bytes takes, over the step's


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        keys: that dynamic keeps a row and KV head.
        repeats: turns; medians are taken over them.
        steps: decode steps in a row that make a turn.
        bandwidth: terabytes a second; None where it is not known.
    """

    keys: int
    repeats: int
    steps: int
    bandwidth: float | None

    @property
    def policy(self) -> Dynamic:
        """The dynamic policy that is timed."""
        return Dynamic(coverage=1.0, min_keys=self.keys, max_keys=self.keys)

    def selection(self) -> dict[str, Any]:
        """What decides which keys are read, for a results file."""
        return fingerprint(self.policy)


def measure(
    config: ModelConfig,
    cells: Sequence[Cell],
    device: torch.device,
    dtype: torch.dtype,
    options: Options,
) -> tuple[list[Record], list[str]]:
    """Time every cell that fits into memory.

    Args:
        config: shape of the model; its weights are small random numbers.
        cells: what to time, in order.
        device: a GPU, or a CPU under Triton's interpreter for a trial.
        dtype: bfloat16, float16 or float32.
        options: how to measure.

    Returns:
        Two records a cell, dense and dynamic, and a sentence for each cell that does not fit.
    """
    with torch.inference_mode():
        decoder = dummy(config, dtype, device)
        fitting, skipped = _fitting(config, cells, device, dtype)
        if not fitting:
            return [], skipped
        caches = _filled_caches(
            config, max(cell.batch * cell.pages for cell in fitting), device, dtype
        )
        records = []
        with tqdm(total=len(fitting) * options.repeats, unit="turn") as progress:
            for cell in fitting:
                progress.set_description(f"{cell.batch} x {cell.context}")
                records += _measure(decoder, caches, cell, options, progress.update)
    return records, skipped


def table(records: Sequence[Record], skipped: Sequence[str]) -> str:
    """The records as text, and what was left out."""
    lines = [
        f"{'batch':>5} {'context':>8} {'policy':<8} {'keys':>8} {'step':>12} {'tokens/s':>9} "
        f"{'GB read':>8} {'of ceiling':>10} {'dense / this':>12}"
    ]
    for r in records:
        share = "" if r.ceiling_share is None else f"{r.ceiling_share:.1%}"
        lines.append(
            f"{r.batch:>5} {r.context:>8} {r.policy:<8} {r.keys:>8.0f} {r.us:>9.0f} us "
            f"{r.tokens_per_s:>9.1f} {r.bytes / 1e9:>8.2f} {share:>10} {r.ratio:>12.2f}"
        )
    return "\n".join([*lines, *skipped])


def step_bytes(decoder: Decoder, cell: Cell, keys: float, *, dynamic: bool) -> int:
    """Bytes that a step reads at least.

    All weights, of an embedding that is no output layer nothing to speak of; and of each row and
    KV head either every key and value, or every key's code, scale and share of its page's centre,
    and the keys and values that are kept.
    """
    config, weight = decoder.config, decoder.model.norm.weight
    parameters = dict(decoder.named_parameters())
    if not config.tied:
        del parameters["model.embed_tokens.weight"]
    pair = 2 * config.head_dim * weight.itemsize
    line = keys * pair
    if dynamic:
        line += cell.context * (4 * words(config.head_dim) + 1 + config.head_dim / PAGE)
    lines = cell.batch * config.layers * config.kv_heads
    return sum(one.nbytes for one in parameters.values()) + round(lines * line)


def _fitting(
    config: ModelConfig, cells: Sequence[Cell], device: torch.device, dtype: torch.dtype
) -> tuple[list[Cell], list[str]]:
    """The cells whose cache fits beside the weights, and why the others are left out."""
    if device.type != "cuda":
        return list(cells), []
    free, _ = torch.cuda.mem_get_info(device)
    page = config.layers * LayerCache.bytes_per_page(config.kv_heads, config.head_dim, dtype)
    fitting, skipped = [], []
    for cell in cells:
        need = cell.batch * cell.pages * page + SLACK
        if need <= free:
            fitting.append(cell)
        else:
            skipped.append(
                f"{cell.batch} x {cell.context} is left out: it needs {need / 2**30:.0f} GiB "
                f"beside the weights, and the device has {free / 2**30:.0f} left."
            )
    return fitting, skipped


def _filled_caches(
    config: ModelConfig, pages: int, device: torch.device, dtype: torch.dtype
) -> list[LayerCache]:
    """A cache a layer, full of random keys and values."""
    generator = torch.Generator(device).manual_seed(1)
    caches = []
    for _ in tqdm(range(config.layers), unit="layer", desc="Filling caches"):
        cache = LayerCache.allocate(pages, config.kv_heads, config.head_dim, dtype, device)
        cache.kv.normal_(generator=generator)
        for some in torch.split(torch.arange(pages, device=device), CODED_AT_ONCE):
            cache.code(some)
        caches.append(cache)
    return caches


def _measure(
    decoder: Decoder,
    caches: Sequence[LayerCache],
    cell: Cell,
    options: Options,
    tick: Callable[[], object],
) -> list[Record]:
    """One cell: dense and dynamic turn by turn, so that the machine's mood hits both alike."""
    ways = [
        CapturedStep(decoder, caches, Bucket(cell.batch, cell.pages, chosen))
        for chosen in (False, True)
    ]
    device = caches[0].kv.device
    step = _step(cell, options.policy, decoder.config.vocab_size, caches[0].kv.shape[1], device)
    keys = [_keys(way, step, cell) for way in ways]
    turns = []
    for _ in range(options.repeats):
        turns.append([_seconds(way, step, options.steps, device) * 1e6 for way in ways])
        tick()
    columns = list(zip(*turns, strict=True))  # microseconds of each turn
    return [
        _record(decoder, cell, name, keys[way], columns[0], columns[way], options.bandwidth)
        for way, name in enumerate(("dense", "dynamic"))
    ]


def _record(
    decoder: Decoder,
    cell: Cell,
    policy: str,
    keys: float,
    dense: Sequence[float],
    times: Sequence[float],
    bandwidth: float | None,
) -> Record:
    us = statistics.median(times)
    read = step_bytes(decoder, cell, keys, dynamic=policy == "dynamic")
    return Record(
        batch=cell.batch,
        context=cell.context,
        policy=policy,
        keys=keys,
        us=us,
        bytes=read,
        dense_us=statistics.median(dense),
        ratio=statistics.median(one / other for one, other in zip(dense, times, strict=True)),
        tokens_per_s=cell.batch / us * 1e6,
        ceiling_share=None if bandwidth is None else read / (bandwidth * 1e6) / us,
    )


def _step(
    cell: Cell, policy: Dynamic, vocab_size: int, cache_pages: int, device: torch.device
) -> DecodeStep:
    """Random tokens behind `context` keys, in pages that lie scattered over the whole cache."""
    generator = torch.Generator().manual_seed(2)
    pages = torch.randperm(cache_pages, generator=generator)[: cell.batch * cell.pages]
    tables = pages.view(cell.batch, cell.pages)
    position = torch.full((cell.batch,), cell.context)
    # Pinned where there is a GPU: its copy then does not wait for the step before.
    step = DecodeStep.padding(Bucket(cell.batch, cell.pages), pinned=device.type == "cuda")
    step.fill(
        torch.randint(vocab_size, (cell.batch,), generator=generator),
        position,
        tables[:, -1] * PAGE + position % PAGE,
        Rows(tables, position + 1, torch.zeros_like(position)),
        torch.tensor([policy.limits]),
    )
    return step


def _keys(way: CapturedStep, step: DecodeStep, cell: Cell) -> float:
    """Keys that a row reads, mean over layers and KV heads; this is also the first replay."""
    found = way.replay(step).keys
    return float(cell.context + 1 if found is None else found.double().mean())


def _seconds(way: CapturedStep, step: DecodeStep, steps: int, device: torch.device) -> float:
    """Of one of `steps` steps in a row: while one runs, the next is on its way to the device."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        way.replay(step)
    _wait(device)
    return (time.perf_counter() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
