"""The scorer study: how cheaply can keys be scored and the ones that matter still be found?

    python tests/bench/scorers.py

Compares ways to score the cached keys of a decode step, on the bundled checkpoint's own queries and
keys and on synthetic keys made to mislead. Each way selects as serving does: the sinks and the
recent window are always kept and count towards the budget, the query heads of a group share the
rest, and a key is worth the mean over these heads of its softmax share under the estimated scores.
What it selected is judged by exact scores, over rows; a row is one query position of one KV head.

- recall: share of the keys that exact scores would choose. Keys that are always kept are left out;
  null where a budget leaves nothing to choose.
- mass, mass_p5: true attention mass on the selected keys, mean over the group; mean and 5th
  percentile over rows. lost: share of rows that lose more than 0.2 of what exact scores would keep.
- bytes_per_key: read to score, for each cached key. What is stored in fewer bits is rounded to them
  before it is used, so that what is charged is what is measured.

Page min/max is Quest (Tang et al. 2024, there with pages of 16), label channels are Double Sparsity
(Yang et al. 2024), the random rotation before quantisation is QuaRot's (Ashkboos et al. 2024).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from models.training.tasks import held_out_key, magic_number, needle_document  # noqa: E402
from tests.bench.scorer_methods import HEAD_DIM, Heads, Method, all_methods, compare  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from models.attention import LayerAttention
    from models.decoder import Decoder

MODEL = ROOT / "models/checkpoints/saccade-12m"
SYNTHETIC = ("clustered", "outlier channels", "spike", "uniform")
TAIL, EVERY = 128, 8  # a row is every 8th of a prompt's last 128 tokens, where the question stands
CHUNK, ANSWER = 2048, 48  # most tokens of a prefill step and of an answer
SETS, ROWS, GROUP = 16, 16, 2  # synthetic: sets of keys, query rows of each, heads of a row
GAIN = 2.0  # standard deviation of the scores of isotropic keys
SPIKE = 10.0  # how far its score stands out: 57% of the mass among 16384 ties


class Tap:
    """Stands in for a layer's attention and keeps the queries that pass through it."""

    def __init__(self, attend: LayerAttention) -> None:
        self.attend, self.impl = attend, attend.impl
        self.queries: list[Tensor] = []

    def __call__(self, query: Tensor, *rest: Any) -> Tensor:
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
        slots=position,  # pages lie in order
        filled=position[:0],  # the cache's own codes are not used
        dense=(DenseGroup(segment, 0),),
        alone=None,
        sparse=(),
    )
    return decoder(step, caches, Recorder())


def answer(decoder: Decoder, taps: Sequence[Tap], prompt: list[int]) -> tuple[Heads, list[int]]:
    """Answer a prompt densely: rows of its question and its answer, and the answer's tokens."""
    config, weight = decoder.config, decoder.model.norm.weight
    pages = -(-(len(prompt) + ANSWER) // PAGE)
    shape = (pages, config.kv_heads, config.head_dim, weight.dtype, weight.device)
    caches = [LayerCache.allocate(*shape) for _ in taps]
    for tap in taps:
        tap.queries.clear()
    tokens, tail = list(prompt), len(prompt) - TAIL
    for start, stop in pairwise([*range(0, tail, CHUNK), tail, len(prompt)]):
        hidden = dense_step(decoder, caches, tokens, start, stop)
    while len(tokens) < len(prompt) + ANSWER:
        tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
        if tokens[-1] in config.eos_ids:
            break
        hidden = dense_step(decoder, caches, tokens, len(tokens) - 1, len(tokens))
    read = sum(len(part) for part in taps[0].queries)  # the last token may not have been
    rows = [*range(tail + EVERY - 1, len(prompt), EVERY), *range(len(prompt), read)]
    place = torch.tensor(rows, device=weight.device)
    queries = torch.stack([torch.cat(tap.queries)[place] for tap in taps])
    queries = queries.unflatten(2, (config.kv_heads, -1)).transpose(1, 2).flatten(0, 1).float()
    keys = torch.cat([cache.kv[:, :, :, 0].flatten(1, 2) for cache in caches])
    return Heads(queries, keys, place + 1), tokens[len(prompt) :]


def checkpoint(device: torch.device, tokens: int, count: int) -> Iterator[Heads]:
    """The bundled checkpoint's queries and keys, all layers' KV heads, document by document."""
    tokenizer = Tokenizer.from_folder(MODEL)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    decoder, _ = load(MODEL, "auto", device)
    taps = [Tap(layer.self_attn.attend) for layer in decoder.model.layers]
    for layer, tap in zip(decoder.model.layers, taps, strict=True):
        layer.self_attn.attend = tap
    for number in range(count):
        rng = np.random.default_rng([number, tokens])
        text = prose(int(rng.integers(2**31)), tokens * 6, held_out=True)
        needle = {"key": held_out_key(rng), "value": magic_number(rng)}
        asked = needle_document(text, encode, tokens=tokens, depth=float(rng.random()), **needle)
        message = [{"role": "user", "content": asked.user_message}]
        prompt = encode(tokenizer.render_chat(message, add_generation_prompt=True))
        heads, reply = answer(decoder, taps, prompt)
        if not asked.correct(tokenizer.decode(reply)):
            tqdm.write(f"{tokens} tokens, document {number}: dense attention answers wrongly")
        yield heads


def synthetic(source: str, device: torch.device, count: int) -> Heads:
    """`count` keys of a synthetic source in each of some sets, and queries for them."""
    generator = torch.Generator().manual_seed(SYNTHETIC.index(source))

    def noise(*size: int) -> Tensor:
        return torch.randn(SETS, *size, HEAD_DIM, generator=generator)

    keys, queries = noise(count), noise(ROWS, GROUP)
    if source == "clustered":  # every page holds keys of many clusters
        centres = noise(64)
        member = torch.randint(64, (SETS, count, 1), generator=generator)
        wanted = torch.randint(64, (SETS, ROWS, 1), generator=generator)
        keys = centres.take_along_dim(member, 1) + keys / 2
        queries = centres.take_along_dim(wanted, 1)[:, :, None] + queries / 2
    elif source == "spike":
        # Keys vary in all directions but the rows' own, so only the spike's score stands out.
        axes = torch.linalg.qr(noise(ROWS).mT).Q.mT  # [sets, rows, head_dim]  orthonormal
        keys -= 0.9 * (keys @ axes.mT) @ axes
        queries = HEAD_DIM**0.5 * axes[:, :, None] + 0.1 * queries
        place = torch.rand(SETS, count - 4 * PAGE, generator=generator).topk(ROWS).indices + PAGE
        keys.scatter_add_(1, place[..., None].expand(axes.shape), SPIKE * axes)
    else:
        queries *= GAIN
    if source == "outlier channels":
        keys[..., torch.randperm(HEAD_DIM, generator=generator)[:4]] *= 20**0.5
    return Heads(queries.to(device), keys.to(device), torch.full((ROWS,), count, device=device))


def study(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of every method on every source at every budget."""
    device, methods = torch.device(options.device), all_methods()
    plans = [("checkpoint", n, options.documents) for n in options.contexts]
    plans += [(source, options.contexts[0], 1) for source in SYNTHETIC]
    plans = [plan for plan in plans if plan[0] in options.sources]
    total = sum(batches for *_, batches in plans) * len(options.budgets) * len(methods)
    records = []
    with torch.inference_mode(), tqdm(total=total, unit="comparison") as progress:
        for source, context, batches in plans:
            progress.set_description(f"{source} {context}")
            found: dict[tuple[int, Method], list[Tensor]] = defaultdict(list)
            parts = (
                checkpoint(device, context, batches)
                if source == "checkpoint"
                else [synthetic(source, device, context)]
            )
            for heads in parts:
                for budget in options.budgets:
                    outcomes = compare(heads, methods, budget)
                    for method, outcome in zip(methods, outcomes, strict=True):
                        found[budget, method].append(outcome)
                        progress.update()
            for (budget, method), outcomes in found.items():
                about = {
                    "method": method.name,
                    "bytes_per_key": round(method.bytes_per_key(budget, context), 2),
                    "budget": budget,
                    "context": context,
                    "source": source,
                }
                records.append(about | summary(torch.cat(outcomes, 1)))
    return records


def summary(outcomes: Tensor) -> dict[str, float | None]:
    """Figures over the rows of recall, mass and mass lost, [3, rows]."""
    recall, mass, lost = outcomes
    known = float(recall.nanmean())
    return {
        "rows": mass.shape[0],
        "recall": None if math.isnan(known) else round(known, 4),
        "mass": round(float(mass.mean()), 4),
        "mass_p5": round(float(mass.quantile(0.05)), 4),
        "lost": round(float((lost > 0.2).float().mean()), 4),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as text, one table a source and context."""
    tables: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for r in sorted(records, key=lambda r: r["budget"]):
        where = tables.setdefault((r["source"], r["context"]), {})
        where.setdefault(r["method"], []).append(r)
    lines = []
    for (source, context), methods in tables.items():
        first = next(iter(methods.values()))
        lines += [
            f"\n{source}, {context} keys, {first[0]['rows']} rows; "
            "for each budget: bytes a key, recall, mass, rows lost",
            f"{'method':<36}" + "".join(f"|{r['budget']:>16}           " for r in first),
        ]
        for name, row in methods.items():
            cells = []
            for r in row:
                recall = "    -" if r["recall"] is None else f"{r['recall']:.3f}"
                cells.append(
                    f"| {r['bytes_per_key']:>5.1f} {recall} {r['mass']:.3f} {r['lost']:>7.2%} "
                )
            lines.append(f"{name:<36}" + "".join(cells))
    return "\n".join(lines)


def machine(device: str) -> str:
    """Name of the GPU or the CPU that computes."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def git_commit() -> str:
    """The commit checked out here, or `unknown` where there is no history."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Run the study, write its records, print its tables."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    sources = ("checkpoint", *SYNTHETIC)
    parser = argparse.ArgumentParser(description="Compare ways to score cached keys.")
    add = parser.add_argument
    add("--sources", nargs="+", choices=sources, default=sources)
    add("--contexts", nargs="+", type=int, default=[16384, 32768], help="synthetic: the first")
    add("--documents", type=int, default=8, help="of the checkpoint, at each context")
    add("--budgets", nargs="+", type=int, default=[128, 512, 1024, 4096], help="keys kept in all")
    add("--device", default=place)
    add("--output", type=Path, default=ROOT / "tests/bench/results/scorers.json")
    add("--commit", default=os.environ.get("SACCADE_COMMIT"), help="git's when left out")
    options = parser.parse_args()
    records = study(options)
    head = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": options.commit or git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(options.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    lines = ",\n".join("  " + json.dumps(record) for record in records)  # one a line, to compare
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{lines}\n ]\n}}\n'
    )
    print(table(records))


if __name__ == "__main__":
    main()
