"""The scorer study: how cheaply can keys be scored and the ones that matter still be found?

    python tests/bench/scorers.py

Compares ways to score the cached keys of a decode step on the bundled checkpoint's own queries and
keys, and on synthetic keys made to break one way or another. Each way selects as serving does: the
sinks and the recent window are always kept and count towards the budget, the query heads of a group
share the rest, and a key is worth the mean over these heads of its softmax share under the scores
that the way estimates. What it selected is then judged by exact scores:

- recall: share of the keys that exact scores would have chosen with the same budget. Keys that are
  always kept are left out of it: they are right under every way.
- mass: true attention mass on the selected keys, mean over the group's heads; its mean and 5th
  percentile over rows. A row is one query position of one KV head.
- lost: share of rows that lose more than 0.2 of the mass that exact scores would have kept.
- bytes_per_key: read to score, for each cached key. Whatever is stored in fewer bits is rounded to
  them first, so that what is charged and what is measured are one thing.

Sources of the ways: page min/max is Quest (Tang et al. 2024), label channels are Double Sparsity
(Yang et al. 2024), the random rotation ahead of quantisation is QuaRot's (Ashkboos et al. 2024).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.cache import LayerCache, Segment  # noqa: E402  (the script also runs uninstalled)
from kernels.page import PAGE  # noqa: E402
from models.attention import Recorder  # noqa: E402
from models.loader import load  # noqa: E402
from models.step import DenseGroup, StepInput  # noqa: E402
from models.tokenizer import Tokenizer  # noqa: E402
from models.training.filler import prose  # noqa: E402
from models.training.tasks import (  # noqa: E402
    NeedleDocument,
    held_out_key,
    magic_number,
    needle_document,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from models.decoder import Decoder

MODEL = ROOT / "models/checkpoints/saccade-12m"
HEAD_DIM = 128  # of the checkpoint and of the synthetic keys
SINKS = 16
QUANTUM = 32  # channels that share a scale
TAIL, EVERY = 128, 8  # every 8th of a prompt's last 128 tokens, where the question stands, is a row
CHUNK, ANSWER = 2048, 48  # most tokens of a prefill step and of an answer
PRINCIPAL_TOKENS = 4096  # tokens from which principal channels are found
LOSS = 0.2
SETS, ROWS, GROUP = 16, 16, 2  # synthetic: sets of keys, query rows of each, heads of a row
GAIN = 2.0  # standard deviation of the scores of isotropic keys
SPIKE = 10.0  # score of a spike above the others; e**10 is 57% of the mass among 16384 ties


@dataclass(frozen=True)
class Heads:
    """Queries and keys of some KV heads with what exact scores say of them; estimates are kept."""

    queries: Tensor  # [heads, rows, group, head_dim]  scaled by head_dim ** -0.5
    keys: Tensor  # [heads, keys, head_dim]  whole pages, as stored in bfloat16
    lengths: Tensor  # int64 [rows]  keys that each row sees
    estimates: dict[str, Tensor] = field(default_factory=dict)  # by scorer

    @cached_property
    def position(self) -> Tensor:
        """int64 [keys]."""
        return torch.arange(self.keys.shape[1], device=self.keys.device)

    @cached_property
    def recent(self) -> Tensor:
        """int64 [rows, 1], page with which the always-kept window begins."""
        return (self.lengths[:, None] // PAGE - 1).clamp_min(0)

    @cached_property
    def visible(self) -> Tensor:
        """bool [rows, keys]."""
        return self.position < self.lengths[:, None]

    @cached_property
    def kept(self) -> Tensor:
        """bool [rows, keys], kept whatever their scores."""
        return self.visible & ((self.position < SINKS) | (self.position >= self.recent * PAGE))

    @cached_property
    def share(self) -> Tensor:
        """True attention mass of each key, mean over the group: [heads, rows, keys]."""
        exact = self.scores(EXACT).masked_fill(~self.visible[:, None], -torch.inf)
        return exact.softmax(-1).mean(2)

    def dot(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Products of [heads, rows, group, d] and [heads, n, d]: [heads, rows, group, n]."""
        return (queries.flatten(1, 2) @ keys.mT).unflatten(1, queries.shape[1:3])

    def scores(self, scorer: Scorer) -> Tensor:
        """Estimated scores [heads, rows, group, keys or pages], computed once."""
        if scorer.name not in self.estimates:
            self.estimates[scorer.name] = scorer.score(self)
        return self.estimates[scorer.name]

    def priority(self, scorer: Scorer, among: Tensor | None = None) -> Tensor:
        """How early each key is chosen, [heads, rows, keys]; -inf where not to be chosen.

        Args:
            scorer: whose scores count.
            among: bool [heads, rows, keys], the keys that are scored at all; None for all.
        """
        if scorer.per_page:
            return self._page_priority(self.scores(scorer))
        # Keys that are kept anyway are read for attention: their scores are known exactly.
        scores = torch.where(self.kept[:, None], self.scores(EXACT), self.scores(scorer))
        free = self.visible & ~self.kept  # [rows, keys]
        if among is not None:
            free = free & among  # [heads, rows, keys]
        scores = scores.masked_fill(~(free | self.kept).unsqueeze(-2), -torch.inf)
        return _log_share(scores).masked_fill(~free, -torch.inf)

    def _page_priority(self, scores: Tensor) -> Tensor:
        """Page by page, in order of the pages' shares; within a page, in order of position."""
        page = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill((page >= self.recent)[:, None], -torch.inf)
        order = _log_share(scores).argsort(-1, descending=True)  # [heads, rows, pages]
        rank = order.argsort(-1).repeat_interleave(PAGE, dim=-1)  # [heads, rows, keys]
        priority = -(rank * PAGE + self.position % PAGE).float()
        return priority.masked_fill(~self.visible | self.kept, -torch.inf)


def _log_share(scores: Tensor) -> Tensor:
    """Log of the softmax shares summed over the group (dim -2), safe from underflow."""
    return (scores - scores.logsumexp(-1, keepdim=True)).logsumexp(-2)


@dataclass(frozen=True, slots=True)
class Scorer:
    """One way to score every key, or every page."""

    name: str
    bytes_per_key: float
    score: Callable[[Heads], Tensor]
    per_page: bool = False


def _page_keys(heads: Heads) -> Tensor:
    return heads.keys.unflatten(1, (-1, PAGE))  # [heads, pages, 64, head_dim]


def _float8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def page_min_max(heads: Heads) -> Tensor:
    """Quest's upper bound of q.k: in each channel, the end of the page's range that q prefers."""
    low, high = (_float8(end) for end in _page_keys(heads).aminmax(dim=2))  # [heads, pages, d]
    q = heads.queries
    return heads.dot(q.clamp_min(0), high) + heads.dot(q.clamp_max(0), low)


def page_spread(heads: Heads, *, deviations: float | None) -> Tensor:
    """Mean score of a page and its spread, the channels taken as independent.

    `deviations` standard deviations above the mean stand for the page's best key; None gives
    mean + variance / 2, the log of the mean of e**score where scores are normal.
    """
    pages = _page_keys(heads)
    mean = heads.dot(heads.queries, _float8(pages.mean(2)))  # [heads, rows, group, pages]
    spread = _float8(pages.std(2, correction=0))  # [heads, pages, d]
    variance = heads.dot(heads.queries.square(), spread.square())
    return mean + (variance / 2 if deviations is None else deviations * variance.sqrt())


def rotation(device: torch.device) -> Tensor:
    """A fixed random orthogonal matrix [head_dim, head_dim]: it spreads outlier channels."""
    noise = torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q.to(device)


def quantised(keys: Tensor, bits: int) -> Tensor:
    """Keys as `bits`-bit codes give them back, scales and zeros in float16; same shape."""
    groups = keys.unflatten(-1, (-1, QUANTUM))  # [heads, keys, head_dim / 32, 32]
    if bits == 1:
        return (groups.sign() * groups.abs().mean(-1, keepdim=True).half()).flatten(-2)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    steps = 2**bits - 1
    step = ((high - low) / steps).half().float().clamp_min(1e-6)
    low = low.half().float()
    return (((groups - low) / step).round().clamp(0, steps) * step + low).flatten(-2)


def low_bit(heads: Heads, *, bits: int, rotated: bool) -> Tensor:
    """Scores of quantised keys; queries are rotated with the keys and not quantised."""
    q, keys = heads.queries, heads.keys
    if rotated:
        turn = rotation(keys.device)
        q, keys = q @ turn, keys @ turn
    return heads.dot(q, quantised(keys, bits))


def label_channels(heads: Heads, *, count: int) -> Tensor:
    """Scores over each head's channels of most energy in the first half of the context."""
    seen = heads.keys[:, : heads.keys.shape[1] // 2]
    best = seen.square().sum(1).topk(count).indices  # [heads, count]
    q = heads.queries.take_along_dim(best[:, None, None], -1)
    return heads.dot(q, heads.keys.take_along_dim(best[:, None], -1))


def principal_channels(heads: Heads, *, count: int) -> Tensor:
    """Scores over each head's principal directions, found in the first tokens."""
    seen = heads.keys[:, : min(PRINCIPAL_TOKENS, int(heads.lengths.min()))]
    centred = seen - seen.mean(1, keepdim=True)
    basis = torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., -count:]  # [heads, d, count]
    stored = (heads.keys @ basis).bfloat16().float()  # [heads, keys, count]
    return heads.dot(heads.queries @ basis[:, None], stored)


EXACT = Scorer("exact", 2 * HEAD_DIM, lambda heads: heads.dot(heads.queries, heads.keys))


def _low_bit_scorer(bits: int, rotated: bool) -> Scorer:
    extra = 2 if bits == 1 else 4  # scale, and zero
    size = HEAD_DIM * bits / 8 + HEAD_DIM // QUANTUM * extra
    name = f"{bits}-bit rotated" if rotated else f"{bits}-bit"
    return Scorer(name, size, partial(low_bit, bits=bits, rotated=rotated))


@dataclass(frozen=True, slots=True)
class Method:
    """A scorer alone, or one that names candidates for another to score again."""

    coarse: Scorer
    fine: Scorer | None = None
    page_share: float = 0.0  # of all pages that become candidates
    budgets: int = 2  # fewest candidates, in budgets

    @property
    def name(self) -> str:
        """As in the table."""
        if self.fine is None:
            return self.coarse.name
        share = f" 1/{round(1 / self.page_share)}" if self.page_share else f" {self.budgets}x"
        return f"{self.coarse.name}{share}, {self.fine.name}"

    def candidates(self, budget: int, keys: int) -> int:
        """Keys that the second scorer sees, of `keys`."""
        pages = max(math.ceil(keys / PAGE * self.page_share), -(-self.budgets * budget // PAGE))
        return min(keys, pages * PAGE)

    def bytes_per_key(self, budget: int, keys: int) -> float:
        """Bytes read to score, over all keys."""
        again = 0.0
        if self.fine is not None:
            again = self.fine.bytes_per_key * self.candidates(budget, keys) / keys
        return self.coarse.bytes_per_key + again

    def priority(self, heads: Heads, budget: int) -> Tensor:
        """How early each key is chosen, [heads, rows, keys]."""
        priority = heads.priority(self.coarse)
        if self.fine is None:
            return priority
        wanted = self.candidates(budget, priority.shape[-1])
        least = priority.topk(wanted, sorted=False).values.amin(-1, keepdim=True)
        return heads.priority(self.fine, among=priority >= least)


def all_methods() -> list[Method]:
    """Every way compared; exact scores first, since the others are measured against them."""
    size = 2 * HEAD_DIM / PAGE  # two vectors of float8 a page
    spread = partial(page_spread, deviations=3.0)
    mean_3sd = Scorer("page mean+3sd", size, spread, per_page=True)
    mean_var = Scorer("page mean+var/2", size, partial(page_spread, deviations=None), per_page=True)
    min_max = Scorer("page min/max", size, page_min_max, per_page=True)
    low = {(b, r): _low_bit_scorer(b, r) for b, r in product((1, 2, 4), (False, True))}
    channels = [
        Scorer(f"{name} channels {count}", 2 * count, partial(score, count=count))
        for name, score in (("label", label_channels), ("principal", principal_channels))
        for count in (16, 32, 64)
    ]
    alone = [EXACT, min_max, mean_3sd, mean_var, *low.values(), *channels]
    by_page = [
        Method(coarse, fine, page_share=1 / part)
        for coarse, fine, part in product(
            (mean_3sd, min_max), (EXACT, low[4, True], low[2, True]), (4, 8, 16, 32)
        )
    ]
    by_key = [Method(low[bits, True], EXACT, budgets=4) for bits in (1, 2)]
    return [*(Method(scorer) for scorer in alone), *by_page, *by_key]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one method did on some rows."""

    recall: Tensor  # [rows]  nan where the budget leaves nothing to choose
    mass: Tensor  # [rows]
    lost: Tensor  # [rows]  mass less than exact scores keep


def compare(heads: Heads, methods: Sequence[Method], budget: int) -> Iterator[Outcome]:
    """The outcome of each method, in order; the first one is the measure of the others."""
    room = (budget - heads.kept.sum(-1)).clamp_min(0)  # [rows]
    room = torch.minimum(room, (heads.visible & ~heads.kept).sum(-1))[:, None]
    always = (heads.share * heads.kept).sum(-1)  # [heads, rows]
    truth = torch.zeros_like(heads.share, dtype=torch.bool)
    best = None
    for method in methods:
        values, order = method.priority(heads, budget).topk(min(budget, truth.shape[-1]))
        chosen = (torch.arange(order.shape[-1], device=order.device) < room) & (values > -torch.inf)
        mass = always + (heads.share.gather(-1, order) * chosen).sum(-1)  # [heads, rows]
        if best is None:
            best = mass
            truth.scatter_(-1, order, chosen)
        recall = (truth.gather(-1, order) & chosen).sum(-1) / room[:, 0]
        yield Outcome(*(x.flatten().cpu() for x in (recall, mass, best - mass)))


class Tap:
    """Stands in for a layer's attention and keeps the queries that pass through it."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self.attend = attend
        self.queries: list[Tensor] = []

    def __call__(self, query: Tensor, *rest: object) -> Tensor:
        self.queries.append(query)  # [tokens, heads, head_dim]
        return self.attend(query, *rest)


def dense_step(
    decoder: Decoder, caches: Sequence[LayerCache], tokens: Sequence[int], start: int, stop: int
) -> Tensor:
    """Hidden states [stop - start, hidden] of `tokens[start:stop]`, all attending densely."""
    device = caches[0].kv.device
    position = torch.arange(start, stop, device=device)
    segment = Segment.of(list(range(caches[0].kv.shape[1])), start, stop - start, device)
    step = StepInput(
        token_ids=torch.tensor(tokens[start:stop], device=device),
        positions=position,
        slots=position,  # pages in order: a token's slot is its position
        filled=position[:0],  # the summaries of the cache are not used
        dense=(DenseGroup(segment, 0),),
        sparse=(),
    )
    return decoder(step, caches, Recorder())


def answer(decoder: Decoder, taps: Sequence[Tap], prompt: list[int]) -> tuple[Heads, list[int]]:
    """Answer a prompt densely: the rows of its question and answer, and the answer's tokens."""
    config, device = decoder.config, decoder.model.norm.weight.device
    pages = -(-(len(prompt) + ANSWER) // PAGE)
    shape = (pages, config.kv_heads, config.head_dim, decoder.model.norm.weight.dtype, device)
    caches = [LayerCache.allocate(*shape) for _ in taps]
    for tap in taps:
        tap.queries.clear()
    tail = len(prompt) - TAIL
    for start, stop in pairwise([*range(0, tail, CHUNK), tail, len(prompt)]):
        hidden = dense_step(decoder, caches, prompt, start, stop)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + ANSWER:
        tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
        if tokens[-1] in config.eos_ids:
            break
        hidden = dense_step(decoder, caches, tokens, len(tokens) - 1, len(tokens))
    read = sum(len(part) for part in taps[0].queries)  # the last token's query is never made
    rows = torch.tensor([*range(tail + EVERY - 1, len(prompt), EVERY), *range(len(prompt), read)])
    queries = torch.stack([torch.cat(tap.queries)[rows.to(device)] for tap in taps]).float()
    grouped = queries.unflatten(2, (config.kv_heads, -1)).transpose(1, 2).flatten(0, 1)
    keys = torch.cat([cache.kv[:, :, :, 0].flatten(1, 2) for cache in caches])
    return _heads(grouped, keys, (rows + 1).to(device)), tokens[len(prompt) :]


def _heads(queries: Tensor, keys: Tensor, lengths: Tensor) -> Heads:
    return Heads(queries * HEAD_DIM**-0.5, keys.bfloat16().float(), lengths)


def document(tokenizer: Tokenizer, tokens: int, number: int) -> NeedleDocument:
    """Prose of about `tokens` tokens with one needle at a random depth, the same every time."""
    rng = np.random.default_rng([number, tokens])
    return needle_document(
        prose(int(rng.integers(2**31)), tokens * 6, held_out=True),
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokens=tokens,
        depth=float(rng.random()),
        key=held_out_key(rng),
        value=magic_number(rng),
    )


def checkpoint(device: torch.device, tokens: int, count: int) -> Iterator[Heads]:
    """The bundled checkpoint's queries and keys, all layers and KV heads, document by document."""
    tokenizer = Tokenizer.from_folder(MODEL)
    decoder, _ = load(MODEL, "auto", device)
    taps = [Tap(layer.self_attn.attend) for layer in decoder.model.layers]
    for layer, tap in zip(decoder.model.layers, taps, strict=True):
        layer.self_attn.attend = tap
    for number in range(count):
        asked = document(tokenizer, tokens, number)
        message = [{"role": "user", "content": asked.user_message}]
        text = tokenizer.render_chat(message, add_generation_prompt=True)
        heads, reply = answer(decoder, taps, tokenizer.encode(text, add_special_tokens=False))
        if not asked.correct(tokenizer.decode(reply)):
            tqdm.write(f"{tokens} tokens, document {number}: dense attention answers wrongly")
        yield heads


def synthetic(source: str, device: torch.device, count: int) -> Heads:
    """Keys of one synthetic source, and queries for them."""
    generator = torch.Generator().manual_seed(len(source))

    def noise(*size: int) -> Tensor:
        return torch.randn(SETS, *size, HEAD_DIM, generator=generator)

    keys, queries = noise(count), noise(ROWS, GROUP)
    if source == "clustered":  # every page holds keys of many clusters
        centres = noise(64)
        member = torch.randint(64, (SETS, count, 1), generator=generator)
        wanted = torch.randint(64, (SETS, ROWS, 1), generator=generator)
        keys = centres.take_along_dim(member, 1) + keys / 2
        queries = centres.take_along_dim(wanted, 1)[:, :, None] + queries / 2
    elif source == "outlier channels":
        keys[..., torch.randperm(HEAD_DIM, generator=generator)[:4]] *= 20**0.5
        queries *= GAIN
    elif source == "spike":
        # Keys vary in all directions but the rows' own, so only the spike's score stands out.
        axes = torch.linalg.qr(noise(ROWS).mT).Q.mT  # [sets, rows, head_dim]  orthonormal
        keys -= 0.9 * (keys @ axes.mT) @ axes
        queries = HEAD_DIM**0.5 * axes[:, :, None] + 0.1 * queries
        place = torch.rand(SETS, count - 4 * PAGE, generator=generator).topk(ROWS).indices + PAGE
        keys.scatter_add_(1, place[..., None].expand(axes.shape), SPIKE * axes)
    else:
        queries *= GAIN
    lengths = torch.full((ROWS,), count, device=device)
    return _heads(queries.to(device), keys.to(device), lengths)


SYNTHETIC = ("clustered", "outlier channels", "spike", "uniform")


@dataclass(frozen=True, slots=True)
class Record:
    """One method on all rows of one source with one budget."""

    method: str
    bytes_per_key: float
    budget: int  # keys kept in total
    context: int  # keys
    source: str
    rows: int
    recall: float | None  # None where the budget leaves nothing to choose
    mass: float
    mass_p5: float
    lost: float

    @staticmethod
    def of(
        method: Method, budget: int, context: int, source: str, outcomes: Sequence[Outcome]
    ) -> Record:
        """Means over the rows of `outcomes`."""
        recall, mass, lost = (
            torch.cat([getattr(o, name) for o in outcomes]) for name in ("recall", "mass", "lost")
        )
        known = float(recall.nanmean())
        return Record(
            method=method.name,
            bytes_per_key=round(method.bytes_per_key(budget, context), 2),
            budget=budget,
            context=context,
            source=source,
            rows=mass.shape[0],
            recall=None if math.isnan(known) else round(known, 4),
            mass=round(float(mass.mean()), 4),
            mass_p5=round(float(mass.quantile(0.05)), 4),
            lost=round(float((lost > LOSS).float().mean()), 4),
        )


def study(options: argparse.Namespace) -> list[Record]:
    """Every method on every source at every budget."""
    device, methods = torch.device(options.device), all_methods()
    plans: list[tuple[str, int, int]] = []  # source, context, batches
    for source in options.sources:
        contexts = options.contexts if source == "checkpoint" else options.contexts[:1]
        batches = options.documents if source == "checkpoint" else 1
        plans += [(source, context, batches) for context in contexts]
    total = sum(batches for *_, batches in plans) * len(options.budgets) * len(methods)
    records = []
    with torch.inference_mode(), tqdm(total=total, unit="comparison", smoothing=0.05) as progress:
        for source, context, batches in plans:
            progress.set_description(f"{source} {context}")
            if source == "checkpoint":
                parts = checkpoint(device, context, batches)
            else:
                parts = iter([synthetic(source, device, context)])
            found: dict[tuple[Method, int], list[Outcome]] = defaultdict(list)
            for heads in parts:
                for budget in options.budgets:
                    outcomes = compare(heads, methods, budget)
                    for method, outcome in zip(methods, outcomes, strict=True):
                        found[method, budget].append(outcome)
                        progress.update()
            records += [
                Record.of(method, budget, context, source, outcomes)
                for (method, budget), outcomes in found.items()
            ]
    return records


def table(records: Sequence[Record]) -> str:
    """The records as text, one table a source and context."""
    lines = []
    budgets = sorted({r.budget for r in records})
    for source, context in dict.fromkeys((r.source, r.context) for r in records):
        here = [r for r in records if (r.source, r.context) == (source, context)]
        lines += [
            f"\n{source}, {context} keys, {here[0].rows} rows: "
            "bytes a key, recall, mass, rows lost, by budget",
            f"{'method':<36}" + "".join(f"|{budget:>15}            " for budget in budgets),
        ]
        for name in dict.fromkeys(r.method for r in here):
            row = f"{name:<36}"
            for r in sorted((r for r in here if r.method == name), key=lambda r: r.budget):
                recall = "    -" if r.recall is None else f"{r.recall:.3f}"
                row += f"| {r.bytes_per_key:>5.1f} {recall} {r.mass:.3f} {r.lost:>6.2%} "
            lines.append(row)
    return "\n".join(lines)


def envelope(options: argparse.Namespace, records: Sequence[Record]) -> str:
    """JSON of the records and of what they come from, one record a line."""
    shown = [
        f"--{name} {' '.join(json.dumps(x) if ' ' in str(x) else str(x) for x in value)}"
        for name, value in (
            ("sources", options.sources),
            ("contexts", options.contexts),
            ("documents", [options.documents]),
            ("budgets", options.budgets),
        )
    ]
    head = {
        "command": " ".join(["python tests/bench/scorers.py", *shown]),
        "commit": options.commit,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(options.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    lines = ",\n".join("  " + json.dumps(asdict(record)) for record in records)
    return json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{lines}\n ]\n}}\n'


def machine(device: str) -> str:
    """Name of the GPU or CPU that computes."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = cpus.read_text().splitlines() if cpus.exists() else []
    known = (line.split(":", 1)[1].strip() for line in names if line.startswith("model name"))
    return next(known, platform.processor() or platform.machine())


def current_commit() -> str:
    """The commit that runs: SACCADE_COMMIT where there is no git history."""
    if "SACCADE_COMMIT" in os.environ:
        return os.environ["SACCADE_COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Run the study, write its records, print its tables."""
    sources = ("checkpoint", *SYNTHETIC)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    results = ROOT / "tests/bench/results/scorers.json"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", nargs="+", choices=sources, default=sources)
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[16384, 32768],
        help="in keys, whole pages of 64; synthetic sources use the first",
    )  # fmt: skip
    parser.add_argument("--documents", type=int, default=8, help="of the checkpoint, a context")
    parser.add_argument("--budgets", nargs="+", type=int, default=[128, 512, 1024, 4096])
    parser.add_argument("--device", default=place)
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--commit", default=current_commit(), help="default: git's, if it knows")
    options = parser.parse_args()
    records = study(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(envelope(options, records))
    print(table(records))


if __name__ == "__main__":
    main()
