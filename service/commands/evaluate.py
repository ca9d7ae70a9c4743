"""`saccade eval`: what sparsity costs in answers, on tasks that can fail."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated

import torch
import typer

from service.config import load_config
from service.engine.build import device_name, machine_name
from service.errors import ConfigError
from service.eval.cell import Cell, documents_for
from service.eval.evaluation import Evaluation, texts_of
from service.eval.plot import check_plot, draw
from service.eval.policies import parse_policy, selections_of
from service.eval.results import Results, table
from service.eval.tasks import TASKS

QUICK_TASKS, QUICK_CONTEXTS, QUICK_DOCUMENTS, QUICK_QUESTIONS = "needles,multi-key", "4096", 4, 8
"""What --quick asks: minutes on two cores."""


def evaluate(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; the bundled one by default.")
    ] = None,
    tasks: Annotated[str, typer.Option(help=f"A list of {', '.join(TASKS)}.")] = "needles",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt, a list.")] = "4096,8192",
    policies: Annotated[
        str, typer.Option(help="A list, separated by semicolons.")
    ] = "dense;dynamic;fixed:sinks:16+window:512",
    documents: Annotated[int, typer.Option(min=1, help="Documents a task and context.")] = 20,
    questions: Annotated[int, typer.Option(min=1, help="Most questions a document.")] = 16,
    answers: Annotated[
        int, typer.Option(min=0, help="Fewest answers a task and context: more documents.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes' worth of it.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of documents and questions.")] = 0,
    text_dir: Annotated[
        Path | None, typer.Option(help="Folder of .txt files to hide facts in, and to predict.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; an interrupted evaluation goes on from it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Accuracy against density, an .svg or .png file.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with a model; GPUs take turns.")
    ] = 1,
    drawers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that draw documents; by default a GPU has some."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Ask questions under several policies, and count right answers.

    The document is prefilled densely, once for all of its questions; the question and the answer
    attend under the policy. The tasks text and repeats ask nothing: the last tokens of a text are
    predicted under the policy. The task free-text asks nothing either: a text is gone on with, and
    right is a sampled continuation without sentences such as were planted into training texts.

    Columns: loss is against dense on the same questions; coverage is estimated. Of steps that also
    read every key, exact is their true coverage, error the estimate's mean distance from it,
    constant that of the best constant guess, and too high the share of estimates more than 0.05
    above it.
    """
    flags = {"model": model, "dtype": dtype, "device": device}
    settings = load_config({name: value for name, value in flags.items() if value}, config)
    if quick:
        tasks, contexts = QUICK_TASKS, QUICK_CONTEXTS
        documents, questions = QUICK_DOCUMENTS, QUICK_QUESTIONS
    names, lengths = _names(tasks), _lengths(contexts)
    if plot is not None:
        check_plot(plot)
    compared = [parse_policy(one, settings.sparsity) for one in policies.split(";")]
    torch_device = torch.device(device_name(settings.device))
    evaluation = Evaluation(
        model=settings.model,
        device=torch_device,
        questions=questions,
        seed=seed,
        texts=texts_of(text_dir),
        dtype=settings.dtype,
        load_format=settings.load_format,
        workers=workers,
        drawers=drawers,
    )
    results = Results.start(
        output,
        shlex.join(["saccade", "eval", *sys.argv[2:]]),
        evaluation.settings(settings.model_name, text_dir, settings.sparsity),
        commit,
        machine_name(torch_device),
        selections_of(compared),
    )
    cells = [
        Cell(task, length, documents_for(task, documents, questions, answers), tuple(compared))
        for length in lengths
        for task in names
    ]
    evaluation.fill(cells, results, output)
    print(table(results.records))
    if plot is not None:
        draw(results.records, plot)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"there is no task {name!r}: choose from {', '.join(TASKS)}")
    return names


def _lengths(text: str) -> list[int]:
    lengths = [length.strip() for length in text.split(",")]
    if not all(one.isascii() and one.isdigit() and int(one) >= 1024 for one in lengths):
        raise ConfigError(f"--contexts must be numbers from 1024, such as 4096,8192, not {text}")
    return [int(length) for length in lengths]
