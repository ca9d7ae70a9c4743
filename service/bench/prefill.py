"""`saccade bench prefill`: one layer's attention of a prompt, sparse against dense, in one run.

A GPU's peers attend to contiguous keys: torch's SDPA on cuDNN and on flash attention, and
FlexAttention with the block mask that the pages of one list make. Pages of the cache lie anywhere.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels.attention import Impl, dense_attention
from kernels.cache import LayerCache, Segment
from kernels.page import PAGE
from kernels.policy import Pages
from kernels.prefill import causal_density, causal_lists, choose, tile_attention, visible_pairs
from service.bench.clock import seconds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from kernels.tiles import TileSelection
    from service.bench.decode import Shape

PEERS = ("sdpa-cudnn", "sdpa-flash", "sdpa")
"""Dense attention over contiguous keys."""
BLOCK = 128
"""Queries and keys of FlexAttention's blocks."""


@dataclass(frozen=True, slots=True)
class Record:
    """Medians of one way at one length."""

    tokens: int
    way: str
    density: float  # keys read over keys visible
    ms: float
    tflops: float  # of the products over the keys read, a second
    dense_ms: float  # of the fastest dense peer
    dense_peer: str
    ratio: float  # the peer over this, median of the paired ratios


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        share: of the pages that the way `share` reads, drawn at random.
        repeats: turns; medians are taken over them.
        flex: whether FlexAttention, which is compiled first, is among the peers.
    """

    share: float
    repeats: int
    flex: bool = False


def measure(
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    options: Options,
) -> list[Record]:
    """Time every way at each length, turn by turn, so that the machine's mood hits all alike."""
    records = []
    with torch.inference_mode(), tqdm(total=len(lengths) * options.repeats, unit="turn") as bar:
        for tokens in lengths:
            bar.set_description(f"{tokens} tokens")
            records += _Bench(tokens, device, dtype, shape, options).run(bar.update)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return records


def table(records: Sequence[Record]) -> str:
    """The records as text."""
    lines = [
        f"{'tokens':>8} {'way':<12} {'density':>8} {'time':>12} {'TFLOP/s':>8} {'peer / this':>11}"
    ]
    lines += [
        f"{r.tokens:>8} {r.way:<12} {r.density:>8.2%} {r.ms:>9.2f} ms {r.tflops:>8.0f} "
        f"{r.ratio:>11.2f}"
        for r in records
    ]
    return "\n".join(lines)


class _Bench:
    """One length: random keys and queries of one prompt, and the ways over them."""

    def __init__(
        self, tokens: int, device: torch.device, dtype: torch.dtype, shape: Shape, options: Options
    ) -> None:
        self.tokens, self.device, self.shape, self.options = tokens, device, shape, options
        self.impl = Impl.of(device, dtype, shape.head_dim, shape.heads // shape.kv_heads)
        self.scale = shape.head_dim**-0.5
        pages = -(-tokens // PAGE)
        generator = torch.Generator(device).manual_seed(0)
        self.cache = LayerCache.allocate(pages, shape.kv_heads, shape.head_dim, dtype, device)
        self.cache.kv.normal_(generator=generator)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        for some in torch.split(order.to(device), 256):
            self.cache.code(some)
        self.segment = Segment.of(order.tolist(), 0, tokens, device)
        self.query = torch.randn(
            tokens, shape.heads, shape.head_dim, generator=generator, device=device, dtype=dtype
        )
        drawn = torch.rand(pages, shape.kv_heads, pages, generator=generator, device=device)
        self.drawn = causal_lists(drawn < options.share, self.segment)

    def run(self, done: Callable[[], object]) -> list[Record]:
        """Records of all ways."""
        ways = {**self._ours(), **self._peers()}
        turns: dict[str, list[float]] = {name: [] for name in ways}
        for way, _ in ways.values():
            way()
        for _ in range(self.options.repeats):
            for name, (way, _) in ways.items():
                turns[name].append(seconds_of(way, self.device) * 1e3)
            done()
        peer = min((n for n in ways if n in PEERS), key=lambda n: statistics.median(turns[n]))
        shape = self.shape
        visible = self.tokens * (self.tokens + 1) / 2
        work = 4 * visible * shape.heads * shape.head_dim
        return [
            Record(
                tokens=self.tokens,
                way=name,
                density=density,
                ms=statistics.median(turns[name]),
                tflops=work * density / statistics.median(turns[name]) / 1e9,
                dense_ms=statistics.median(turns[peer]),
                dense_peer=peer,
                ratio=statistics.median(
                    one / other for one, other in zip(turns[peer], turns[name], strict=True)
                ),
            )
            for name, (_, density) in ways.items()
        ]

    def _ours(self) -> dict[str, tuple[Callable[[], object], float]]:
        rest = (self.scale, self.impl)
        where = (self.query, self.cache, self.segment)
        least = Pages().least

        def attend(lists: TileSelection) -> object:
            return tile_attention(*where, lists, *rest)

        def selected() -> object:  # as much is chosen as without a budget, and the drawn are read
            choose(*where, least, *rest)
            return attend(self.drawn)

        chosen = choose(*where, least, *rest)
        whole = causal_lists(torch.ones_like(self._flags(self.drawn)), self.segment)
        density = self._density(self.drawn)
        return {
            "dense": (lambda: dense_attention(*where, self.scale, None, self.impl), 1.0),
            "every page": (lambda: attend(replace(whole, left=None)), 1.0),
            "share": (selected, density),
            "share alone": (lambda: attend(replace(self.drawn, left=None)), density),
            "dynamic": (
                lambda: attend(choose(*where, least, *rest)),
                self._density(chosen),
            ),
        }

    def _density(self, lists: TileSelection) -> float:
        """Keys read over keys visible, of all tokens together: the share of the work."""
        seen = visible_pairs(self.segment)
        return float((causal_density(lists, self.segment) * seen).sum() / seen.sum())

    def _flags(self, lists: TileSelection) -> Tensor:
        pages = len(self.segment.block_table)
        return torch.zeros(*lists.counts.shape, pages, dtype=torch.bool, device=self.device)

    def _peers(self) -> dict[str, tuple[Callable[[], object], float]]:
        pages = self.cache.kv[:, self.segment.block_table].flatten(1, 2)[None, :, : self.tokens]
        keys, values = (pages[..., number, :].contiguous() for number in (0, 1))
        query = self.query.transpose(0, 1)[None].contiguous()
        group = self.shape.heads // self.shape.kv_heads
        if self.device.type != "cuda":  # enable_gqa is several times slower there
            keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))

        def sdpa(backend: SDPBackend | None) -> object:
            if backend is None:
                return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, keys, values, is_causal=True, enable_gqa=True
                )

        if self.device.type != "cuda":
            return {"sdpa": (lambda: sdpa(None), 1.0)}
        peers: dict[str, tuple[Callable[[], object], float]] = {
            "sdpa-cudnn": (lambda: sdpa(SDPBackend.CUDNN_ATTENTION), 1.0),
            "sdpa-flash": (lambda: sdpa(SDPBackend.FLASH_ATTENTION), 1.0),
        }
        if self.options.flex:
            peers |= self._flex(query, keys, values)
        return peers

    def _flex(
        self, query: Tensor, keys: Tensor, values: Tensor
    ) -> dict[str, tuple[Callable[[], object], float]]:
        """FlexAttention and our own over the same blocks of 128 queries and keys."""
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        blocks = self.tokens // BLOCK
        generator = torch.Generator(self.device).manual_seed(1)
        drawn = torch.rand(blocks, blocks, generator=generator, device=self.device)
        own = torch.eye(blocks, dtype=torch.bool, device=self.device)
        full = (drawn < self.options.share).tril(-1)

        def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
            order = mask.int().argsort(dim=1, descending=True, stable=True)
            return mask.sum(1).int()[None, None], order.int()[None, None]

        mask = BlockMask.from_kv_blocks(
            *listed(own), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=_causal
        )
        compiled = torch.compile(flex_attention)
        pages = full.repeat_interleave(BLOCK // PAGE, 0).repeat_interleave(BLOCK // PAGE, 1)
        tiles = torch.arange(len(pages), device=self.device)
        # A page beside a tile's own in the same block is before it, or behind it and not seen.
        pages = pages | (tiles[:, None] // 2 == tiles[None] // 2)
        lists = causal_lists(
            pages[:, None].expand(-1, self.shape.kv_heads, -1).contiguous(), self.segment
        )
        density = self._density(lists)
        ours = replace(lists, left=None)
        return {
            "flex": (
                lambda: compiled(query, keys, values, block_mask=mask, enable_gqa=True),
                density,
            ),
            "as flex": (
                lambda: tile_attention(
                    self.query, self.cache, self.segment, ours, self.scale, self.impl
                ),
                density,
            ),
        }


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
    """FlexAttention's form of a mask."""
    return key <= query
