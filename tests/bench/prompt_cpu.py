"""A prompt of text on this CPU, dense and dynamic turn by turn, under the bundled checkpoint.

python tests/bench/prompt_cpu.py NOVEL.txt [--tokens 32768] [--repeats 3] [--threads 2]

Random weights attend to nearly all keys alike: how much is read only a trained model tells. Below
`--dense-below`, by default where the service does, the dynamic prompt is dense, too. Where other
processes run on the cores, one thread says the most: two wait for each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.prefill import in_tiles  # noqa: E402  (the script also runs uninstalled)
from models.loader import load  # noqa: E402
from models.tokenizer import Tokenizer  # noqa: E402
from service.bench.prompt import compare, table  # noqa: E402
from service.sparsity import SparsityConfig  # noqa: E402

MODEL = ROOT / "models/checkpoints/saccade-12m"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("text", type=Path)
    add("--tokens", type=int, default=32_768)
    add("--chunk", type=int, default=1024)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--dense-below", type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    decoder, config = load(MODEL, "auto", torch.device("cpu"))
    dtype = decoder.model.embed_tokens.weight.dtype
    below = given.dense_below
    if below is None:
        tiles = in_tiles(dtype, config.head_dim, decoder.impl)
        below = SparsityConfig().prefill_dense_below_on("cpu", tiles=tiles)
    ids = torch.tensor(Tokenizer.from_folder(MODEL).encode(given.text.read_text()))[: given.tokens]
    if len(ids) < given.tokens:
        sys.exit(f"{given.text} has {len(ids)} tokens, fewer than {given.tokens}")
    print(f"{dtype}, {given.threads} threads, dense below {below}")
    print(table(compare(decoder, ids, given.chunk, given.repeats, dense_below=below)))


if __name__ == "__main__":
    main()
