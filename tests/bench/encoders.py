"""A forward pass of Longformer and BigBird at their published sizes, beside transformers' own.

python3 tests/bench/encoders.py [--device cuda] [--dtypes bfloat16,float32] [--output FILE]

768 channels, 12 heads, 12 layers; Longformer with a window of 512 and the first token global,
BigBird with blocks of 64, of which 3 at random. Weights are random and the same on both sides, and
the outputs are compared, too. Where transformers is not installed, the same layers with torch's
dense attention are the peer. Sides take turns, so that the machine's mood hits both alike; a ratio
is the median over turns of this side's seconds over the peer's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.encoders.layers import activated  # noqa: E402  (the script also runs uninstalled)
from models.encoders.loader import load  # noqa: E402
from models.encoders.texts import Packed, Text  # noqa: E402
from service.bench.clock import seconds_of  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402

if TYPE_CHECKING:
    from models.encoders.encoder import Encoder

SHAPE = {
    "vocab_size": 50_304,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
FAMILIES = {
    "LongformerModel": {"attention_window": 512, "max_position_embeddings": 4098},
    "BigBirdModel": {"block_size": 64, "num_random_blocks": 3, "max_position_embeddings": 4096},
}
CASES = (
    ("LongformerModel", "published"),
    ("BigBirdModel", "published"),
    ("BigBirdModel", "transformers_eval"),
)


@dataclass(frozen=True)
class Record:
    """One model in one dtype."""

    model: str
    random_attention: str | None  # of BigBird
    dtype: str
    tokens: int
    ms: float  # medians
    cpu_ms: float  # of all cores
    peer: str
    peer_ms: float
    peer_cpu_ms: float
    ratio: float  # this side's seconds over the peer's
    cpu_ratio: float
    error: float | None  # largest difference of the outputs; None: the peer computes another thing
    first_ms: float  # the first pass, which makes the lists of pages


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu")
    add("--dtypes", help="float32 on a CPU, and bfloat16 too on a GPU")
    add("--tokens", type=int, default=4096)
    add("--layers", type=int, default=12)
    add("--repeats", type=int, default=5)
    add("--models", default="LongformerModel,BigBirdModel")
    add("--commit")
    add("--output", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    dtypes = given.dtypes or ("float32" if device.type == "cpu" else "bfloat16,float32")
    if find_spec("transformers") is None:
        print("transformers is not installed: the peer is torch's dense attention")
    records = []
    with torch.inference_mode():
        for dtype in dtypes.split(","):
            for architecture, regime in CASES:
                if architecture in given.models.split(","):
                    records.append(measure(architecture, regime, dtype, device, given))
                    print(json.dumps(vars(records[-1])), flush=True)
    if given.output is not None:
        machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        if device.type == "cuda":
            machine = torch.cuda.get_device_name(device)
        line = shlex.join(["python", *sys.argv])
        settings = SHAPE | {"num_hidden_layers": given.layers, "repeats": given.repeats}
        head = envelope(line, given.commit or current_commit(), machine, settings)
        given.output.write_text(as_json(head, records))


def measure(
    architecture: str, regime: str, dtype: str, device: torch.device, given: argparse.Namespace
) -> Record:
    """Both sides of one model, turn by turn."""
    values = SHAPE | FAMILIES[architecture] | {"num_hidden_layers": given.layers}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(values | {"architectures": [architecture]}))
        encoder = load(folder, dtype, device, "dummy", regime)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (given.tokens,), generator=generator)
    chosen = (0,) if architecture == "LongformerModel" else ()
    text = Text.of(ids.tolist(), global_tokens=chosen)

    def ours() -> torch.Tensor:
        return encoder([text])[0]

    first, _ = _timed(ours, device)
    if find_spec("transformers") is None:
        peer, theirs, error = "dense sdpa", (lambda: dense(encoder, text)), None
        theirs()
    else:
        peer, theirs = "transformers", oracle(encoder, values, regime, ids.to(device), bool(chosen))
        error = (ours() - theirs().float()).abs().max().item()
    turns = [(*_timed(ours, device), *_timed(theirs, device)) for _ in range(given.repeats)]
    wall, cpu, peer_wall, peer_cpu = zip(*turns, strict=True)
    return Record(
        model=architecture,
        random_attention=regime if architecture == "BigBirdModel" else None,
        dtype=dtype,
        tokens=given.tokens,
        ms=statistics.median(wall),
        cpu_ms=statistics.median(cpu),
        peer=peer,
        peer_ms=statistics.median(peer_wall),
        peer_cpu_ms=statistics.median(peer_cpu),
        ratio=statistics.median(a / b for a, b in zip(wall, peer_wall, strict=True)),
        cpu_ratio=statistics.median(a / b for a, b in zip(cpu, peer_cpu, strict=True)),
        error=error,
        first_ms=first,
    )


def oracle(encoder: Encoder, values: dict, regime: str, ids: torch.Tensor, chosen: bool):
    """Transformers' forward pass with the same weights."""
    import transformers

    name = encoder.config.architecture
    config = getattr(transformers, name.replace("Model", "Config"))(
        **values,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=encoder.config.norm_eps,
    )
    with torch.device(ids.device):
        model = getattr(transformers, name)(config, add_pooling_layer=False)
    weights = {encoder.stored_name(one): part for one, part in encoder.named_parameters()}
    model.load_state_dict(weights, strict=True)
    model.to(encoder.embeddings.word_embeddings.weight.dtype)
    # Only in train mode transformers draws BigBird's random blocks.
    model.train(name == "BigBirdModel" and regime == "published")
    arguments = {}
    if chosen:
        arguments["global_attention_mask"] = (torch.arange(len(ids)) == 0).long()[None].to(ids)
    return lambda: model(ids[None], **arguments).last_hidden_state[0]


def dense(encoder: Encoder, text: Text) -> torch.Tensor:
    """The same layers with torch's dense attention, which sees all."""
    packed = Packed.of([text], encoder.embeddings.word_embeddings.weight.device)
    hidden = encoder.embeddings(packed)
    for layer in encoder.layer:
        own = layer.attention.self
        query, keys, values = (
            part(hidden).view(len(hidden), encoder.config.heads, -1).transpose(0, 1)[None]
            for part in (own.query, own.key, own.value)
        )
        found = F.scaled_dot_product_attention(query, keys, values)[0].transpose(0, 1).flatten(1)
        added = layer.attention.output(found, hidden)
        inner = activated(layer.intermediate["dense"](added), encoder.config.activation)
        hidden = layer.output(inner, added)
    return hidden.float()


def _timed(way, device: torch.device) -> tuple[float, float]:
    """Milliseconds by the clock and of all cores."""
    begin = time.process_time()
    wall = seconds_of(way, device)
    return wall * 1e3, (time.process_time() - begin) * 1e3


if __name__ == "__main__":
    main()
