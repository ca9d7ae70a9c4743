"""`saccade bench decode`: one layer's attention of a decode step, dynamic against dense.

On a GPU every way is captured into a CUDA graph and replayed; on a CPU it is called. Caches and
queries change from one repeat to the next, so that nothing is found in a GPU's cache.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels import dynamic
from kernels.attention import Impl, dense_attention, dense_decode
from kernels.cache import LayerCache, Rows, Segment
from kernels.codes import words
from kernels.fingerprint import fingerprint
from kernels.page import PAGE
from kernels.policy import Dynamic
from service.bench.clock import seconds_of
from service.bench.record import Record, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from service.bench.cell import Cell

__all__ = ["Options", "Shape", "measure", "table"]

APART = 512 << 20
"""Bytes that are read before the same are read again, on a GPU."""
PEERS = ("sdpa-cudnn", "sdpa-flash", "sdpa", "flex")
"""Other dense attention, over contiguous keys."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention layer."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        keys: that dynamic keeps a row and KV head, about.
        repeats: turns; medians are taken over them.
        bandwidth: terabytes a second that reading reaches; None where it is not known.
        flex: whether FlexAttention, which is compiled first, is among the peers.
    """

    keys: int
    repeats: int
    bandwidth: float | None
    flex: bool = False

    @property
    def policy(self) -> Dynamic:
        """The dynamic policy that is timed."""
        return Dynamic(coverage=1.0, min_keys=self.keys, max_keys=self.keys)

    def selection(self) -> dict[str, Any]:
        """What decides which keys are read, for a results file."""
        return fingerprint(self.policy)


def measure(
    cells: Sequence[Cell], device: torch.device, dtype: torch.dtype, shape: Shape, options: Options
) -> list[Record]:
    """Time every way at each cell, turn by turn, so that the machine's mood hits all alike."""
    records = []
    with torch.inference_mode(), tqdm(total=len(cells) * options.repeats, unit="turn") as progress:
        for cell in cells:
            progress.set_description(f"{cell.batch} x {cell.context}")
            records += _Bench(cell, device, dtype, shape, options).run(progress.update)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return records


class _Bench:
    """One cell: sets of random keys and queries, and the ways over them."""

    def __init__(
        self, cell: Cell, device: torch.device, dtype: torch.dtype, shape: Shape, options: Options
    ) -> None:
        self.cell, self.device, self.dtype, self.shape = cell, device, dtype, shape
        self.options = options
        self.impl = Impl.of(device, dtype, shape.head_dim, shape.heads // shape.kv_heads)
        self.scale = shape.head_dim**-0.5
        self.policy = options.policy
        self.pages = -(-cell.context // PAGE)
        read = self._bytes("dynamic", options.keys)
        self.sets = max(1, -(-APART // read)) if device.type == "cuda" else 1
        generator = torch.Generator(device).manual_seed(0)
        total = self.pages * cell.batch * self.sets
        self.cache = LayerCache.allocate(total, shape.kv_heads, shape.head_dim, dtype, device)
        for some in torch.split(torch.arange(total, device=device), 1024):
            part = self.cache.kv[:, some[0] : some[-1] + 1]
            part.normal_(generator=generator)
            self.cache.code(some)
        order = torch.arange(total, device=device)
        if device.type == "cuda":  # pages lie anywhere, as an engine's do
            order = torch.randperm(total, device=device, generator=generator)
        lengths = torch.full((cell.batch,), cell.context, device=device)
        self.rows = [
            Rows(table, lengths, torch.zeros_like(lengths))
            for table in order.view(self.sets, cell.batch, self.pages)
        ]
        self.segments = [  # of the one set on a CPU, where dense attention takes each for itself
            Segment.of(table, cell.context - 1, 1, device)
            for table in self.rows[0].block_tables.tolist()
        ]
        self.queries = torch.randn(
            self.sets, cell.batch, shape.heads, shape.head_dim, generator=generator, device=device
        ).to(dtype)

    def run(self, done: Callable[[], object]) -> list[Record]:
        """Records of all ways."""
        ways = dict(self._ways())
        turns: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.options.repeats):
            for name, way in ways.items():
                turns[name].append(way())
            done()
        peers = [name for name in ways if name in PEERS]
        peer = min(peers, key=lambda name: statistics.median(turns[name]))
        return [self._record(name, turns[name], peer, turns[peer]) for name in ways]

    def _record(self, name: str, turns: list[float], peer: str, dense: list[float]) -> Record:
        keys = float(self.cell.context)
        if name == "dynamic":
            keys = float(self._dynamic(0).keys.float().mean())
        size, us = self._bytes(name, keys), statistics.median(turns)
        bandwidth = self.options.bandwidth
        return Record(
            batch=self.cell.batch,
            context=self.cell.context,
            policy=name,
            keys=keys,
            us=us,
            bytes=size,
            dense_us=statistics.median(dense),
            dense_peer=peer,
            ratio=statistics.median(one / two for one, two in zip(dense, turns, strict=True)),
            limit_share=None if bandwidth is None else size / (bandwidth * 1e6) / us,
        )

    def _bytes(self, name: str, keys: float) -> int:
        """Bytes that a way reads at least."""
        shape, context = self.shape, self.cell.context
        lines = self.cell.batch * shape.kv_heads
        if name == "topk":  # a float32 score of every key
            return lines * context * 4
        line = keys * 2 * shape.head_dim * self.dtype.itemsize
        if name == "dynamic":  # a code, a scale, and a share of the page's centre
            line += context * (4 * words(shape.head_dim) + 1 + shape.head_dim / PAGE)
        return round(lines * line)

    def _dynamic(self, number: int) -> dynamic.Attended:
        return dynamic.attend(
            self.queries[number], self.cache, self.rows[number], self.policy, self.scale,
            impl=self.impl,
        )  # fmt: skip

    def _dense(self, number: int) -> Tensor:
        query, rows = self.queries[number], self.rows[number]
        if self.device.type == "cuda":
            return dense_decode(query, self.cache, rows, self.scale, self.impl)[0]
        tokens = zip(query[:, None], self.segments, strict=True)
        return torch.cat([dense_attention(q, self.cache, s, self.scale) for q, s in tokens])

    def _ways(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Every way's name, and what times it once: microseconds."""
        yield "dynamic", self._timed(self._dynamic, self.sets)
        yield "dense", self._timed(self._dense, self.sets)
        yield from self._peers()

    def _peers(self) -> Iterator[tuple[str, Callable[[], float]]]:
        shape, cell = self.shape, self.cell
        dense = self._bytes("dense", cell.context)
        sets = min(self.sets, max(2, -(-APART // dense))) if self.device.type == "cuda" else 1
        size = (sets, 2, cell.batch, shape.kv_heads, cell.context, shape.head_dim)
        pairs = torch.empty(size, dtype=self.dtype, device=self.device).normal_()
        scale = self.scale
        if self.device.type != "cuda":
            # The group's heads as rows of a query: several times faster there than `enable_gqa`.
            query = self.queries[0].view(cell.batch, shape.kv_heads, -1, shape.head_dim)
            keys, values = pairs[0]
            way = self._timed(
                lambda _: F.scaled_dot_product_attention(query, keys, values, scale=scale), 1
            )
            yield "sdpa", way
            return

        def sdpa(number: int) -> Tensor:
            query, (keys, values) = self.queries[number][:, :, None], pairs[number]
            return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)

        for name, backend in (
            ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        ):
            with sdpa_kernel(backend):
                yield name, self._timed(sdpa, sets)
        if self.options.flex:
            from torch.nn.attention.flex_attention import flex_attention

            compiled = torch.compile(flex_attention)

            def flex(number: int) -> object:
                query, (keys, values) = self.queries[number][:, :, None], pairs[number]
                return compiled(query, keys, values, scale=scale, enable_gqa=True)

            yield "flex", self._timed(flex, sets)
        scores = torch.randn(sets, cell.batch * shape.kv_heads, cell.context, device=self.device)
        kept = min(self.options.keys, cell.context)
        yield "topk", self._timed(lambda n: scores[n].topk(kept).values, sets)

    def _timed(self, way: Callable[[int], object], sets: int) -> Callable[[], float]:
        """What runs a way over all sets once: microseconds of each."""
        if self.device.type != "cuda":
            way(0)
            return lambda: seconds_of(lambda: way(0), self.device) * 1e6
        for _ in range(2):
            way(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(sets):
                way(number)

        def replayed() -> float:
            # Not from idle: a GPU that has nothing to do waits for the host to send the graph.
            graph.replay()
            return seconds_of(graph.replay, self.device) * 1e6 / sets

        return replayed
