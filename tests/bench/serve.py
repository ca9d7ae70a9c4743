"""The whole service over HTTP, dynamic against dense: time to the first token, and between tokens.

python3 tests/bench/serve.py [--commit HASH] [--output FILE] [--engine FILE] [--tokens 131072]
    [SERVE OPTIONS ...]

Makes a checkpoint of a named shape without weights, starts `saccade serve --standalone` on it with
random ones, and sends streaming completions one after the other, the policies in turn, each with a
prompt of its own. Options that are not the script's go to the service, such as --no-cuda-graphs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import tokenizers
import torch
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.cache import LayerCache  # noqa: E402  (the script also runs uninstalled)
from kernels.page import PAGE  # noqa: E402
from service.bench.engine import Record as StepRecord  # noqa: E402
from service.bench.shapes import shape_of  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402
from tests.bench.running import running, standalone  # noqa: E402

if TYPE_CHECKING:
    from models.config import ModelConfig

POLICIES = ("dense", "dynamic")
ROOM = 256
"""Tokens of a step besides a prompt's chunk: its tail, or what other sequences decode."""
START = 900
"""Seconds that the service has to start."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client saw of one request."""

    ttft: float  # seconds from sending it to its first token
    gaps: list[float]  # seconds between tokens
    sparsity: dict  # the service's report
    replays: float  # decode steps that ran as CUDA graphs


@dataclass(frozen=True, slots=True)
class Record:
    """All requests under one policy."""

    prompt_tokens: int
    policy: str
    requests: int
    ttft_s: float  # median
    itl_ms_p50: float  # over all tokens of all requests
    itl_ms_p99: float
    tokens_per_s: float  # behind the first, median over requests
    density: float  # means over requests
    coverage: float
    fallbacks: dict[str, int]  # tokens, over all requests
    replays: int


def write_checkpoint(folder: Path, config: ModelConfig, max_position: int) -> None:
    """What the service needs of a checkpoint whose weights it makes up: no token ends a text."""
    rope = {
        "rope_type": config.rope.kind,
        "rope_theta": config.rope.theta,
        "factor": config.rope.factor,
        "low_freq_factor": config.rope.low_freq_factor,
        "high_freq_factor": config.rope.high_freq_factor,
        "original_max_position_embeddings": config.rope.original_max_position,
    }
    fields = {
        "architectures": [config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": max_position,
        "tie_word_embeddings": config.tied,
        "dtype": config.dtype,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    vocab = {f" w{token}": token for token in range(config.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=" w0"))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))


def ask(client: httpx.Client, prompt: list[int], policy: str, tokens: int) -> Answer:
    """One streaming completion."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    before = replays(client)
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "sparsity": {"policy": policy},
        }
    )
    headers = {"Content-Type": "application/json"}
    times, last = [time.perf_counter()], {}
    with client.stream("POST", "/v1/completions", content=body, headers=headers) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"the service answered {reply.status_code}: {reply.read().decode()}")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                last = json.loads(line.removeprefix("data: "))
                if "error" in last:
                    raise SystemExit(f"the service answered: {last['error']}")
    if len(times) != tokens + 1:
        raise SystemExit(f"{len(times) - 1} tokens came instead of {tokens}")
    first, *gaps = np.diff(times).tolist()
    return Answer(first, gaps, last["sparsity"], replays(client) - before)


def replays(client: httpx.Client) -> float:
    """Decode steps that the service has run as CUDA graphs."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return sum(one.value for one in samples if one.name == "saccade_cuda_graph_replays_total")


def measure(
    url: str, vocab: int, prompt: int, tokens: int, repeats: int
) -> dict[str, list[Answer]]:
    """Answers by policy; what a first request of each compiles is not in them."""
    rng = np.random.default_rng(0)
    answers: dict[str, list[Answer]] = {policy: [] for policy in POLICIES}
    with (
        httpx.Client(base_url=url, timeout=START) as client,
        tqdm(total=(1 + repeats) * len(POLICIES), unit="request") as progress,
    ):
        for turn in range(1 + repeats):
            for policy in POLICIES:
                progress.set_description(f"{policy}, {'measured' if turn else 'warming up'}")
                ids = rng.integers(vocab, size=prompt).tolist()
                answer = ask(client, ids, policy, tokens)
                if turn:
                    answers[policy].append(answer)
                progress.update()
    return answers


def record(prompt: int, policy: str, answers: list[Answer]) -> Record:
    """Medians and means of a policy's answers."""
    gaps = np.array([one.gaps for one in answers])  # [requests, tokens - 1]
    fallbacks: Counter[str] = Counter()
    for one in answers:
        fallbacks.update(one.sparsity["fallbacks"])
    return Record(
        prompt_tokens=prompt,
        policy=policy,
        requests=len(answers),
        ttft_s=float(np.median([one.ttft for one in answers])),
        itl_ms_p50=float(np.median(gaps)) * 1e3,
        itl_ms_p99=float(np.percentile(gaps, 99)) * 1e3,
        tokens_per_s=float(np.median(1 / gaps.mean(1))),
        density=float(np.mean([one.sparsity["density"] for one in answers])),
        coverage=float(np.mean([one.sparsity["coverage"] for one in answers])),
        fallbacks=dict(fallbacks),
        replays=round(sum(one.replays for one in answers)),
    )


def table(records: list[Record]) -> str:
    """The records as text."""
    lines = [
        f"{'prompt':>8} {'policy':<8} {'first token':>11} {'between, p50':>12} {'p99':>10} "
        f"{'tokens/s':>8} {'density':>8} {'coverage':>8} {'replays':>8}  fallbacks"
    ]
    lines += [
        f"{r.prompt_tokens:>8} {r.policy:<8} {r.ttft_s:>9.2f} s {r.itl_ms_p50:>9.2f} ms "
        f"{r.itl_ms_p99:>7.2f} ms {r.tokens_per_s:>8.1f} {r.density:>8.2%} {r.coverage:>8.4f} "
        f"{r.replays:>8}  {r.fallbacks}"
        for r in records
    ]
    return "\n".join(lines)


def beside(engine: Path, served: str) -> str:
    """A results file of `engine.py` with what its model does as a service, under `http`."""
    whole = json.loads(engine.read_text(encoding="utf-8"))
    records = [StepRecord(**record) for record in whole.pop("records")]
    return as_json(whole | {"http": json.loads(served)}, records)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--engine",
        type=Path,
        help="results of engine.py that these join: there, where there is no --output",
    )
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=131_072, help="of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=4, help="requests a policy")
    parser.add_argument("--chunk", type=int, default=4096, help="prompt tokens a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    given, more = parser.parse_known_args()
    config = shape_of(given.shape, given.layers)
    longest = given.tokens + given.new
    pages = -(-longest // PAGE) + 1
    page = LayerCache.bytes_per_page(config.kv_heads, config.head_dim, getattr(torch, given.dtype))
    options = {
        "load_format": "dummy",
        "device": given.device,
        "dtype": given.dtype,
        "max_model_len": longest,
        "kv_cache_gib": pages * page * config.layers / 2**30,
        "max_num_seqs": 1,
        "prefill_chunk": given.chunk,
        "max_step_tokens": given.chunk + ROOM,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, longest)
        with running(standalone(Path(folder), *flags, *more), START) as service:
            answers = measure(
                service.url, config.vocab_size, given.tokens, given.new, given.repeats
            )
    records = [record(given.tokens, policy, answers[policy]) for policy in POLICIES]
    print(table(records))
    target = given.output or given.engine
    if target is None:
        return
    on_gpu = given.device.startswith("cuda")
    machine = torch.cuda.get_device_name(given.device) if on_gpu else "CPU"
    settings = {"shape": given.shape, "layers": config.layers, "new_tokens": given.new}
    command = shlex.join(["python", *sys.argv])
    head = envelope(
        command,
        given.commit or current_commit(),
        machine,
        settings | options | {"more": more},
    )
    text = as_json(head, records)
    target.write_text(text if given.engine is None else beside(given.engine, text))


if __name__ == "__main__":
    main()
