"""A prompt's attention on a GPU, and a model's whole prompt: the table of results.

python3 tests/bench/prefill.py [--commit HASH] [--output FILE] [--no-flex] [--lengths 1024,...]

The same as `saccade bench prefill` and `saccade bench engine --prompt`, where the service's
packages are not installed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.bench import prefill, prompt  # noqa: E402  (the script also runs uninstalled)
from service.bench.decode import Shape  # noqa: E402
from service.bench.shapes import shape_of  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--commit")
    add("--output", type=Path)
    add("--lengths", default="1024,4096,8192,16384,32768,131072")
    add("--prompt", type=int, default=131_072, help="of the whole model; 0 for none")
    add("--chunk", type=int, default=4096)
    add("--layers", type=int)
    add("--share", type=float, default=0.1)
    add("--repeats", type=int, default=5)
    add("--no-flex", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda", 0)
    options = prefill.Options(given.share, given.repeats, not given.no_flex)
    lengths = [int(length) for length in given.lengths.split(",")]
    records = prefill.measure(lengths, device, torch.bfloat16, Shape(), options)
    print(prefill.table(records))
    prompts = []
    if given.prompt:
        config = shape_of("llama-3.1-8b", given.layers)
        prompts = prompt.measure(config, given.prompt, given.chunk, device, torch.bfloat16, 2)
        print(prompt.table(prompts))
    if given.output is None:
        return
    settings = asdict(Shape()) | {"dtype": "bfloat16"} | asdict(options)
    line = shlex.join(["python", *sys.argv])
    commit = given.commit or current_commit()
    head = envelope(line, commit, torch.cuda.get_device_name(device), settings)
    head |= {"model": "llama-3.1-8b", "prompts": [asdict(one) for one in prompts]}
    given.output.write_text(as_json(head, records))


if __name__ == "__main__":
    main()
