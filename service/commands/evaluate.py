"""`saccade eval`: what sparsity costs in answers, on tasks that can fail."""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from tqdm import tqdm

from models.config import ModelConfig
from service.config import load_config
from service.engine.build import device_name, machine_name
from service.errors import ConfigError
from service.eval.measure import Item, Plan
from service.eval.plot import check_plot, draw
from service.eval.policies import parse_policy
from service.eval.record import record_cell
from service.eval.results import Results, table
from service.eval.tasks import MARGIN, TASKS, TOKENS_A_VOTE, VOTES, Task
from service.eval.workers import Setup, examine

if TYPE_CHECKING:
    from service.eval.record import DocumentScore

QUICK_TASKS, QUICK_CONTEXTS, QUICK_DOCUMENTS, QUICK_QUESTIONS = "needles,multi-key", "4096", 4, 8
"""What --quick asks: minutes on two cores."""
SELDOM = 10.0
"""Seconds between two states of the progress bar where no terminal shows it."""


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
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Ask the same questions under several policies, and count right answers.

    The document is prefilled densely, once for all of its questions; the question and the answer
    attend under the policy. The tasks text and repeats ask nothing: the last tokens of a text are
    predicted under the policy.
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
    results = Results.start(
        output,
        shlex.join(["saccade", "eval", *sys.argv[2:]]),
        {
            "model": settings.model_name,
            "seed": seed,
            "documents": documents,
            "questions": questions,
            "answers": answers,
            "text": None if text_dir is None else text_dir.name,
            "sparsity": settings.sparsity.model_dump(),
            "majority": {"margin": MARGIN, "votes": VOTES, "tokens_a_vote": TOKENS_A_VOTE},
        },
        commit,
        machine_name(torch_device),
    )
    wanted = [
        (task, length)
        for length in lengths
        for task in names
        if not results.has(task, length, [policy.name for policy in compared])
    ]
    if wanted:
        longest = max(length for _, length in wanted)
        ModelConfig.from_folder(settings.model).resolve_max_model_len(longest)
        setup = Setup(
            settings.model,
            settings.dtype,
            settings.load_format,
            _texts(text_dir),
            longest,
            Plan(tuple(compared), questions, seed),
        )
        counts = {task: _documents(task, documents, questions, answers) for task in names}
        _measure(setup, wanted, counts, torch_device, workers, results, output)
    print(table(results.records))
    if plot is not None:
        draw(results.records, plot)


def _measure(
    setup: Setup,
    wanted: list[tuple[str, int]],
    documents: dict[str, int],
    device: torch.device,
    workers: int,
    results: Results,
    output: Path | None,
) -> None:
    """Fill in the wanted cells, saving each as it is complete."""
    items = [
        Item(task, length, number) for task, length in wanted for number in range(documents[task])
    ]
    cells: dict[tuple[str, int], dict[int, list[DocumentScore]]] = defaultdict(dict)
    often = 0.1 if sys.stderr.isatty() else SELDOM
    with tqdm(total=len(items), unit="document", mininterval=often) as progress:
        for item, scores in examine(setup, items, device, workers):
            cell = cells[item.task, item.context]
            cell[item.document] = scores
            progress.set_description(f"{item.task} {item.context}", refresh=False)
            progress.update()
            if len(cell) == documents[item.task]:
                # By number: the faster of two workers must not change the sums.
                ordered = [cell[number] for number in sorted(cell)]
                passages = not isinstance(TASKS[item.task], Task)
                results.add(record_cell(item.task, item.context, ordered, passages=passages))
                del cells[item.task, item.context]
                if output is not None:
                    results.save(output)


def _documents(name: str, documents: int, questions: int, answers: int) -> int:
    task = TASKS[name]
    if not isinstance(task, Task):
        return documents
    return max(documents, task.documents(answers, questions))


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


def _texts(folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    try:
        texts = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt"))]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text-dir {folder} holds a file that is not UTF-8 text") from error
    if not texts:
        raise ConfigError(f"--text-dir {folder} holds no .txt file")
    return tuple(texts)
