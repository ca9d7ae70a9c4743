"""`saccade bench`: measurements of this machine."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated

import torch
import typer

from models.loader import usable_device
from service.bench import decode as decode_bench
from service.errors import ConfigError


def decode(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    contexts: Annotated[str, typer.Option(help="Keys in the cache, a list.")] = "8192,65536",
    keys: Annotated[int, typer.Option(min=1, help="Keys that dynamic keeps.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 60,
    output: Annotated[Path | None, typer.Option(help="Also write the records as JSON.")] = None,
) -> None:
    """Time one decode step's attention: dynamic, dense, and torch's over contiguous keys."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype must be one of {', '.join(dtypes)}, not {dtype}")
    sizes = [one.strip() for one in contexts.split(",")]
    if not all(one.isascii() and one.isdigit() and int(one) > 0 for one in sizes):
        raise ConfigError(f"--contexts must be numbers such as 8192,65536, not {contexts}")
    usable_device(device)
    records = decode_bench.measure(
        [int(one) for one in sizes],
        keys=keys,
        device=device,
        dtype=dtypes[dtype],
        shape=decode_bench.Shape(),
        repeats=repeats,
    )
    print(decode_bench.table(records))
    if output is not None:
        output.write_text(json.dumps(decode_bench.as_json(records), indent=2) + "\n")
