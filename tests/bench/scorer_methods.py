"""Ways to score cached keys, as the scorer study compares them; see `scorers.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch

from kernels.codes import by_keys, encode, rotation, signs_of
from kernels.page import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

HEAD_DIM = 128  # of the checkpoint and of synthetic keys
SINKS = 16
SCALED = 32  # channels that share a scale
LEARN = 4096  # tokens from which principal channels are found


class Heads:
    """Queries and keys of some KV heads, what exact scores say of them, and estimates."""

    def __init__(self, queries: Tensor, keys: Tensor, lengths: Tensor) -> None:
        self.queries = queries * HEAD_DIM**-0.5  # [heads, rows, group, head_dim]
        self.keys = keys.bfloat16().float()  # [heads, keys, head_dim]  whole pages
        self.position = torch.arange(keys.shape[1], device=keys.device)  # [keys]
        self.visible = self.position < lengths[:, None]  # [rows, keys]
        self.recent = (lengths[:, None] // PAGE - 1).clamp_min(0)  # [rows, 1]  window's first page
        always = (self.position < SINKS) | (self.position >= self.recent * PAGE)
        self.kept = always & self.visible  # [rows, keys]  kept whatever their scores
        self.free = ~always & self.visible  # [rows, keys]
        self.exact = self.dot(self.queries, self.keys)  # [heads, rows, group, keys]
        masked = self.exact.masked_fill(~self.visible[:, None], -torch.inf)
        self.share = masked.softmax(-1).mean(2)  # [heads, rows, keys]  true mass
        self._estimates: dict[Scorer, Tensor] = {}

    @property
    def pages(self) -> Tensor:
        """[heads, pages, 64, head_dim]."""
        return self.keys.unflatten(1, (-1, PAGE))

    def dot(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Products of [heads, rows, group, d] and [heads, n, d]: [heads, rows, group, n]."""
        return (queries.flatten(1, 2) @ keys.mT).unflatten(1, queries.shape[1:3])

    def priority(self, scorer: Scorer, among: Tensor | None = None) -> Tensor:
        """How early each key is chosen, [heads, rows, keys]; -inf: never.

        Args:
            scorer: whose scores count.
            among: bool [heads, rows, keys], the only keys that are scored; None for all.
        """
        if scorer not in self._estimates:
            self._estimates[scorer] = scorer.score(self)
        scores = self._estimates[scorer]  # [heads, rows, group, keys or pages]
        if scorer.per_page:
            return self._page_by_page(scores)
        free = self.free if among is None else self.free & among  # [(heads,) rows, keys]
        # Keys that are kept anyway are read for attention: their scores are known exactly.
        scores = torch.where(self.kept[:, None], self.exact, scores)
        scores = scores.masked_fill(~(free | self.kept).unsqueeze(-2), -torch.inf)
        return _log_share(scores).masked_fill(~free, -torch.inf)

    def _page_by_page(self, scores: Tensor) -> Tensor:
        """Pages in order of their shares, the keys of a page in order of position."""
        page = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill((page >= self.recent)[:, None], -torch.inf)
        rank = _log_share(scores).argsort(-1, descending=True).argsort(-1)  # [heads, rows, pages]
        place = rank.repeat_interleave(PAGE, dim=-1) * PAGE + self.position % PAGE
        return (-place.float()).masked_fill(~self.free, -torch.inf)


def _log_share(scores: Tensor) -> Tensor:
    """Log of the softmax shares summed over the group, safe from underflow."""
    return (scores - scores.logsumexp(-1, keepdim=True)).logsumexp(-2)


def _float8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def page_min_max(heads: Heads) -> Tensor:
    """Quest's upper bound of q.k: in each channel, the end of the page's range that q prefers."""
    low, high = (_float8(end) for end in heads.pages.aminmax(dim=2))  # [heads, pages, head_dim]
    q = heads.queries
    return heads.dot(q.clamp_min(0), high) + heads.dot(q.clamp_max(0), low)


def page_spread(heads: Heads, *, deviations: float | None) -> Tensor:
    """A page's mean score and its spread, channels taken as independent.

    The best key is taken to lie `deviations` standard deviations above the mean. None gives mean +
    variance / 2, the log of the mean of e**score where scores are normal.
    """
    mean = heads.dot(heads.queries, _float8(heads.pages.mean(2)))  # [heads, rows, group, pages]
    spread = _float8(heads.pages.std(2, correction=0))  # [heads, pages, head_dim]
    variance = heads.dot(heads.queries.square(), spread.square())
    return mean + (variance / 2 if deviations is None else deviations * variance.sqrt())


def quantised(keys: Tensor, bits: int) -> Tensor:
    """Keys as `bits`-bit codes give them back, scales and zeros in float16; same shape."""
    groups = keys.unflatten(-1, (-1, SCALED))  # [heads, keys, head_dim / 32, 32]
    if bits == 1:
        return (groups.sign() * groups.abs().mean(-1, keepdim=True).half()).flatten(-2)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-6)
    low = low.half().float()
    codes = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + low).flatten(-2)


def low_bit(heads: Heads, *, bits: int, rotated: bool) -> Tensor:
    """Scores of quantised keys; a fixed random rotation of both sides spreads outlier channels."""
    q, keys = heads.queries, heads.keys
    if rotated:
        noise = torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(0))
        turn = torch.linalg.qr(noise).Q.to(keys.device)  # [head_dim, head_dim]  orthogonal
        q, keys = q @ turn, keys @ turn
    return heads.dot(q, quantised(keys, bits))


def centred_code(heads: Heads) -> Tensor:
    """Scores by the codes that serving uses: one bit a channel, around each page's mean."""
    mean = heads.pages.mean(2).bfloat16().float()  # [heads, pages, head_dim]
    codes, scale = encode(heads.pages, mean)
    signs = signs_of(codes, torch.float32, HEAD_DIM)  # [heads, keys, head_dim]
    q = heads.queries
    rest = heads.dot(q @ rotation(HEAD_DIM, q.dtype, q.device), signs)
    return rest * by_keys(scale).flatten(1)[:, None, None] + heads.dot(q, mean).repeat_interleave(
        PAGE, -1
    )


def label_channels(heads: Heads, *, count: int) -> Tensor:
    """Scores over each head's channels of most energy in the first half of the context."""
    seen = heads.keys[:, : heads.keys.shape[1] // 2]
    best = seen.square().sum(1).topk(count).indices  # [heads, count]
    q = heads.queries.take_along_dim(best[:, None, None], -1)
    return heads.dot(q, heads.keys.take_along_dim(best[:, None], -1))


def principal_channels(heads: Heads, *, count: int) -> Tensor:
    """Scores over each head's principal directions, found in the first tokens."""
    seen = heads.keys[:, :LEARN]
    centred = seen - seen.mean(1, keepdim=True)
    basis = torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., -count:]  # [heads, d, count]
    return heads.dot(heads.queries @ basis[:, None], (heads.keys @ basis).bfloat16().float())


@dataclass(frozen=True, slots=True)
class Scorer:
    """One way to score every key, or every page."""

    name: str
    bytes_per_key: float
    score: Callable[[Heads], Tensor]  # to [heads, rows, group, keys or pages]
    per_page: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """A scorer alone, or one that names candidates for another to score."""

    coarse: Scorer
    fine: Scorer | None = None
    part: int = 0  # candidates are one in so many pages,
    budgets: int = 2  # and at least so many budgets of keys

    @property
    def name(self) -> str:
        """As in the table."""
        share = f"1/{self.part}" if self.part else f"{self.budgets}x"
        return f"{self.coarse.name} {share}, {self.fine.name}" if self.fine else self.coarse.name

    def candidates(self, budget: int, keys: int) -> int:
        """How many of `keys` keys the second scorer sees: whole pages."""
        least = -(-self.budgets * budget // PAGE)
        pages = max(least, -(-keys // (PAGE * self.part))) if self.part else least
        return min(keys, pages * PAGE)

    def bytes_per_key(self, budget: int, keys: int) -> float:
        """Bytes read to score, over all keys."""
        share = self.candidates(budget, keys) / keys
        return self.coarse.bytes_per_key + (self.fine.bytes_per_key * share if self.fine else 0)

    def priority(self, heads: Heads, budget: int) -> Tensor:
        """How early each key is chosen, [heads, rows, keys]; -inf: never."""
        priority = heads.priority(self.coarse)
        if self.fine is None:
            return priority
        wanted = self.candidates(budget, priority.shape[-1])
        least = priority.topk(wanted, sorted=False).values.amin(-1, keepdim=True)
        return heads.priority(self.fine, among=priority >= least)


def all_methods() -> list[Method]:
    """Every way compared; exact scores first, since the others are measured against them."""
    exact = Scorer("exact", 2 * HEAD_DIM, lambda heads: heads.exact)
    page = partial(Scorer, bytes_per_key=2 * HEAD_DIM / PAGE, per_page=True)  # two float8 vectors
    bounds = page("page min/max", score=page_min_max)
    spread = page("page mean+3sd", score=partial(page_spread, deviations=3.0))
    normal = page("page mean+var/2", score=partial(page_spread, deviations=None))
    low = {
        (bits, rotated): Scorer(
            f"{bits}-bit rotated" if rotated else f"{bits}-bit",
            # Codes, and for each group of channels a scale and, behind 1-bit signs, no zero.
            HEAD_DIM * bits / 8 + HEAD_DIM // SCALED * (2 if bits == 1 else 4),
            partial(low_bit, bits=bits, rotated=rotated),
        )
        for bits, rotated in product((1, 2, 4), (False, True))
    }
    # Signs, a scale, and a share of the page's mean.
    code = Scorer("centred code", HEAD_DIM / 8 + 4 + 2 * HEAD_DIM / PAGE, centred_code)
    channels = [
        Scorer(f"{name} channels {count}", 2 * count, partial(score, count=count))
        for name, score in (("label", label_channels), ("principal", principal_channels))
        for count in (16, 32, 64)
    ]
    alone = [exact, bounds, spread, normal, *low.values(), code, *channels]
    fine = (exact, low[4, True], low[2, True])
    pages = [Method(*way) for way in product((spread, bounds), fine, (4, 8, 16, 32))]
    keys = [Method(low[bits, True], exact, budgets=4) for bits in (1, 2)]
    keys += [Method(code, exact, budgets=budgets) for budgets in (2, 4)]
    return [*map(Method, alone), *pages, *keys]


def compare(heads: Heads, methods: Sequence[Method], budget: int) -> Iterator[Tensor]:
    """Recall, mass and mass lost, [3, rows], of each method; the first is the others' measure."""
    room = (budget - heads.kept.sum(-1)).clamp_min(0)  # [rows]  keys that scores choose
    room = torch.minimum(room, heads.free.sum(-1))
    always = (heads.share * heads.kept).sum(-1)  # [heads, rows]
    truth = torch.zeros_like(heads.share, dtype=torch.bool)
    best = None
    for method in methods:
        ranked = method.priority(heads, budget).topk(min(budget, truth.shape[-1]))
        place = torch.arange(ranked.indices.shape[-1], device=room.device)
        chosen = (place < room[:, None]) & (ranked.values > -torch.inf)
        mass = always + (heads.share.gather(-1, ranked.indices) * chosen).sum(-1)
        if best is None:
            best = mass
            truth.scatter_(-1, ranked.indices, chosen)
        recall = (truth.gather(-1, ranked.indices) & chosen).sum(-1) / room  # nan without room
        yield torch.stack((recall, mass, best - mass)).flatten(1).cpu()
