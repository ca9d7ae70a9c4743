"""`saccade bench serve`: a load on a server, and how it bears it."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from service.engine.build import machine_name
from service.envelope import as_json, current_commit, envelope
from service.errors import ConfigError
from service.load.choice import base_url, check_endpoint, json_fields, numbers, prompts_for
from service.load.lengths import FORMS, parse_lengths
from service.load.objectives import MEASURES, parse_objective
from service.load.plan import Mix, Planned, anew, closed_plan, open_plan, traced_plan
from service.load.report import page
from service.load.run import Loop, run
from service.load.summary import Summary, first_said, label, summarise, table
from service.load.target import Target, first_model
from service.load.trace import read_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.load.outcome import Outcome

_SLO = "Objective, such as ttft:2.0; again for more. " + "; ".join(
    f"{name}: {text}" for name, text in MEASURES.items()
)
_LOADS = "give one of --rate, --users and --trace"
_MOST = 10_000_000
"""Requests of a plan."""


def load(
    url: Annotated[str, typer.Option(help="Any server of OpenAI's API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The first of /v1/models.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer token.", envvar="OPENAI_API_KEY")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    rate: Annotated[str | None, typer.Option(help="Open loop: requests a second, a list.")] = None,
    arrivals: Annotated[str, typer.Option(help="Of an open loop: poisson, constant.")] = "poisson",
    users: Annotated[str | None, typer.Option(help="Closed loop: users at once, a list.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Open loop: JSONL of timestamp (ms), input_length, output_length."),
    ] = None,
    speed: Annotated[float, typer.Option(min=1e-3, help="Times a trace's own pace.")] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="At most; 100 without --duration.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds in which requests are sent.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before, not measured.")] = 1,
    prompt: Annotated[str, typer.Option(help=f"Tokens of a prompt: {FORMS}.")] = "512",
    output: Annotated[str, typer.Option(help="Tokens of an answer, likewise.")] = "64",
    shared: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a prompt that its group shares.")
    ] = 0.0,
    groups: Annotated[int, typer.Option(min=1, help="Number of shared prefixes.")] = 1,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The server's tokenizer, to send texts of exact lengths.")
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option(help="Ids of completions' prompts without a tokenizer; 300-1299."),
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Saccade's field, JSON.")] = None,
    extra: Annotated[str | None, typer.Option(help="More fields of requests, JSON.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers are as long as asked for.")] = True,
    slo: Annotated[list[str] | None, typer.Option(help=_SLO)] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report.")] = None,
    details: Annotated[
        Path | None, typer.Option(help="Write every request, a line of JSON each.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
) -> None:
    """Put a load on a server of OpenAI's API, and measure it.

    An open loop sends each request when it is due, whatever the server does, and counts latencies
    from then; in a closed loop each user sends as soon as the last answer has ended.
    """
    if sum(one is not None for one in (rate, users, trace)) > 1:
        raise ConfigError(_LOADS)
    base, kind = base_url(url), check_endpoint(endpoint)
    objectives = [parse_objective(one) for one in slo or ()]
    mix = Mix(parse_lengths(prompt), parse_lengths(output), shared, groups)
    most = requests if requests is not None or duration is not None else 100
    plans = _plans(mix, rate, arrivals, users, trace, speed, most, duration, seed)
    prompts = prompts_for(kind, tokenizer, token_ids, seed)
    asked, more = json_fields(sparsity, "--sparsity"), json_fields(extra, "--extra") or {}
    for file in (json_file, html_file, details):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {file.absolute().parent} to write {file.name}")
    name = model or asyncio.run(first_model(base, api_key))
    target = Target(base, kind, name, api_key, ignore_eos, asked, more)
    before = closed_plan(mix, warmup, seed + 1)
    runs: list[tuple[Summary, Sequence[Outcome]]] = []
    for number, (which, plan) in enumerate(plans):
        loop = Loop(which.get("users"), timeout, duration)
        title = " ".join(str(part) for part in which.values())
        outcomes = asyncio.run(
            run(anew(plan, number, mix), target, prompts, loop, name=title, warmup=before)
        )
        before = []
        runs.append((summarise(outcomes, objectives, **which), outcomes))
    records = [record for record, _ in runs]
    print(table(records))
    for record, each in runs:
        for kind in record.errors:
            if said := first_said(each, kind):
                print(f"{label(record)}, the first {kind}: {said}")
    command = shlex.join(["saccade", "bench", "serve", *_without_key(sys.argv[3:])])
    machine = machine_name(torch.device("cpu"))
    settings = {
        "url": base,
        "model": name,
        "endpoint": kind,
        "prompt": prompt,
        "output": output,
        "shared": shared,
        "groups": groups,
        "sparsity": asked,
        "slo": slo or [],
        "seed": seed,
    }
    head = envelope(command, commit or current_commit(), machine, settings)
    if json_file is not None:
        json_file.write_text(as_json(head, records))
    if html_file is not None:
        html_file.write_text(page(head, runs))
    if details is not None:
        _write_details(details, runs)


def _plans(
    mix: Mix,
    rate: str | None,
    arrivals: str,
    users: str | None,
    trace: Path | None,
    speed: float,
    requests: int | None,
    duration: float | None,
    seed: int,
) -> list[tuple[dict[str, Any], list[Planned]]]:
    """What each run sends, with what its record says of its load.

    Raises:
        ConfigError: a load is none, or sends nothing.
    """
    plans: list[tuple[dict[str, Any], list[Planned]]] = []
    if trace is not None:
        rows = read_trace(trace)
        plan = traced_plan(rows, seed, speed=speed, requests=requests, duration=duration)
        plans.append(({"load": "trace"}, plan))
    elif rate is not None:
        for each in numbers(rate, "--rate"):
            planned = open_plan(mix, arrivals, each, seed, requests=requests, duration=duration)
            plans.append(({"load": arrivals, "rate": each}, planned))
    else:
        for many in numbers(users or "1", "--users"):
            if many != int(many):
                raise ConfigError(f"--users must be whole numbers, not {users}")
            # A duration ends a closed loop; how many it will have sent is not known.
            plan = closed_plan(mix, requests or int(max(1, duration or 0) * 1000), seed)
            plans.append(({"load": "closed", "users": int(many)}, plan))
    if not all(plan for _, plan in plans):
        raise ConfigError("no request is due within --duration: make it longer")
    return plans


def _write_details(file: Path, runs: Sequence[tuple[Summary, Sequence[Outcome]]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for number, (_, outcomes) in enumerate(runs):
            for outcome in outcomes:
                lines.write(json.dumps({"run": number} | asdict(outcome)) + "\n")


def _without_key(arguments: Sequence[str]) -> list[str]:
    """The arguments as typed, less the secret among them."""
    shown: list[str] = []
    for argument in arguments:
        if shown and shown[-1] == "--api-key":
            shown.append("...")
        else:
            shown.append("--api-key=..." if argument.startswith("--api-key=") else argument)
    return shown
