"""`saccade bench`: measurements of this machine."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated

import torch
import typer

from kernels.page import PAGE
from models.loader import usable_device
from service.bench import decode as decode_bench
from service.bench import engine as engine_bench
from service.bench import plot as decode_plot
from service.bench import prefill as prefill_bench
from service.bench import prompt as prompt_bench
from service.bench.cell import Cell, bandwidth_of
from service.bench.shapes import SHAPES, shape_of
from service.engine.build import machine_name
from service.envelope import as_json, current_commit, envelope
from service.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def decode(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cells: Annotated[
        str, typer.Option(help="Batch x keys in the cache, a list.")
    ] = "1x8192,1x65536",
    keys: Annotated[int, typer.Option(min=1, help="Keys that dynamic keeps.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 60,
    flex: Annotated[
        bool, typer.Option("--flex", help="On a GPU, also FlexAttention, compiled first.")
    ] = False,
    bandwidth: Annotated[
        float | None, typer.Option(help="TB/s that reading reaches; by the device's name.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the records as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw them, an .svg or .png file.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
) -> None:
    """Time one decode step's attention: dynamic, dense, torch's.

    Torch's is over contiguous keys.
    """
    _check_dtype(dtype)
    wanted, place = _cells(cells), usable_device(device)
    machine = machine_name(place)
    bandwidth = bandwidth or bandwidth_of(machine)
    shape, options = decode_bench.Shape(), decode_bench.Options(keys, repeats, bandwidth, flex)
    records = decode_bench.measure(wanted, place, DTYPES[dtype], shape, options)
    print(decode_bench.table(records))
    if plot is not None:
        decode_plot.draw(records, plot)
    if output is not None:
        settings = asdict(shape) | {"dtype": dtype} | asdict(options)
        settings["selection"] = options.selection()
        command = shlex.join(["saccade", "bench", "decode", *sys.argv[3:]])
        head = envelope(command, commit or current_commit(), machine, settings)
        output.write_text(as_json(head, records))


def prefill(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, a list.")] = "8192,32768",
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the pages, drawn at random, for one way.")
    ] = 0.1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 5,
    flex: Annotated[
        bool, typer.Option("--flex", help="On a GPU, also FlexAttention, compiled first.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the records as JSON.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
) -> None:
    """Time a prompt's attention in one layer: sparse, dense, torch's.

    Torch's is over contiguous keys.
    """
    _check_dtype(dtype)
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", lengths):
        raise ConfigError(f"--lengths must be numbers such as 8192,32768, not {lengths}")
    place, shape = usable_device(device), decode_bench.Shape()
    options = prefill_bench.Options(share, repeats, flex)
    wanted = [int(length) for length in lengths.split(",")]
    records = prefill_bench.measure(wanted, place, DTYPES[dtype], shape, options)
    print(prefill_bench.table(records))
    if output is not None:
        settings = asdict(shape) | {"dtype": dtype} | asdict(options)
        command = shlex.join(["saccade", "bench", "prefill", *sys.argv[3:]])
        head = envelope(command, commit or current_commit(), machine_name(place), settings)
        output.write_text(as_json(head, records))


def engine(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    cells: Annotated[
        str, typer.Option(help="Batch x keys in the cache, a list.")
    ] = "1x1024,1x131072,4x131072,6x131072",
    device: Annotated[str, typer.Option(help="cuda, or a CPU for a trial.")] = "cuda",
    keys: Annotated[int, typer.Option(min=1, help="Keys that dynamic keeps.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers; the shape's own.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a row that make a turn.")] = 8,
    prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of a prompt to time instead of decode steps.")
    ] = 0,
    chunk: Annotated[int, typer.Option(min=64, help="Of its tokens a step.")] = 4096,
    bandwidth: Annotated[
        float | None, typer.Option(help="TB/s that reading reaches; by the device's name.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the records as JSON.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
) -> None:
    """Time whole decode steps of a model: dynamic and dense.

    Its weights are random, its steps CUDA graphs. With --prompt, a whole prompt up to its first
    token instead.
    """
    _check_dtype(dtype)
    config, wanted = shape_of(shape, layers), _cells(cells)
    place = usable_device(device)
    if prompt:
        if chunk % PAGE or prompt % chunk:
            raise ConfigError(
                f"--prompt must be a multiple of --chunk, and that of {PAGE}: not {prompt} and "
                f"{chunk}"
            )
        prompts = prompt_bench.measure(config, prompt, chunk, place, DTYPES[dtype], repeats)
        print(prompt_bench.table(prompts))
        if output is not None:
            settings = {"shape": shape, "layers": config.layers, "dtype": dtype, "repeats": repeats}
            command = shlex.join(["saccade", "bench", "engine", *sys.argv[3:]])
            head = envelope(command, commit or current_commit(), machine_name(place), settings)
            output.write_text(as_json(head, prompts))
        return
    if config.patterns is not None:
        raise ConfigError(
            f"decode steps of --shape {shape} are not captured as CUDA graphs; time its prompts "
            "with --prompt"
        )
    if place.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "saccade bench engine needs a GPU; for a trial without one set TRITON_INTERPRET=1"
        )
    machine = machine_name(place)
    bandwidth = bandwidth or bandwidth_of(machine)
    options = engine_bench.Options(keys, repeats, steps, bandwidth)
    records, skipped = engine_bench.measure(config, wanted, place, DTYPES[dtype], options)
    print(engine_bench.table(records, skipped))
    if output is None:
        return
    settings = {
        "shape": shape,
        "layers": config.layers,
        "dtype": dtype,
        "keys": keys,
        "repeats": repeats,
        "steps": steps,
        "bandwidth_tb_s": bandwidth,
        "selection": options.selection(),
    }
    command = shlex.join(["saccade", "bench", "engine", *sys.argv[3:]])
    head = envelope(command, commit or current_commit(), machine, settings)
    output.write_text(as_json(head | {"skipped": skipped}, records))


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype}")


def _cells(text: str) -> list[Cell]:
    cells = [re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", one.strip()) for one in text.split(",")]
    if not all(cells):
        raise ConfigError(f"--cells must be batch x context, such as 1x1024,4x131072, not {text}")
    return [Cell(int(cell[1]), int(cell[2])) for cell in cells if cell]
