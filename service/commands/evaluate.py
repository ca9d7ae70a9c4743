"""`saccade eval`: what sparsity costs in answers, on tasks that can fail."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from models.loader import load
from models.tokenizer import Tokenizer
from service.config import load_config
from service.engine.build import device_name, machine_name
from service.errors import ConfigError
from service.eval.measure import measure_cell
from service.eval.policies import parse_policy
from service.eval.results import Results, table
from service.eval.session import Session
from service.eval.tasks import TASKS, Source

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
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes' worth of it.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of documents and questions.")] = 0,
    text_dir: Annotated[
        Path | None, typer.Option(help="Folder of .txt files to hide facts in.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; an interrupted evaluation goes on from it.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to note where there is no repository.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Ask the same questions under several policies, and count right answers.

    The document is prefilled densely, once for all of its questions; the question and the answer
    attend under the policy.
    """
    flags = {"model": model, "dtype": dtype, "device": device}
    settings = load_config({name: value for name, value in flags.items() if value}, config)
    if quick:
        tasks, contexts = QUICK_TASKS, QUICK_CONTEXTS
        documents, questions = QUICK_DOCUMENTS, QUICK_QUESTIONS
    names, lengths = _names(tasks), _lengths(contexts)
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
            "text": None if text_dir is None else text_dir.name,
            "sparsity": settings.sparsity.model_dump(),
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
        tokenizer = Tokenizer.from_folder(settings.model)
        decoder, shape = load(settings.model, settings.dtype, torch_device, settings.load_format)
        shape.resolve_max_model_len(max(length for _, length in wanted))
        session = Session(
            decoder, shape, tokenizer, tokens=max(length for _, length in wanted), together=16
        )
        source = Source(
            lambda text: tokenizer.encode(text, add_special_tokens=False), _texts(text_dir)
        )
        with tqdm(total=len(wanted) * documents * len(compared), unit="round") as progress:
            for task, length in wanted:
                progress.set_description(f"{task} {length}")
                cell = measure_cell(
                    session,
                    tokenizer,
                    source,
                    TASKS[task],
                    length,
                    compared,
                    documents=documents,
                    questions=questions,
                    seed=seed,
                    progress=progress.update,
                )
                results.add(cell)
                if output is not None:
                    results.save(output)
    print(table(results.records))


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
