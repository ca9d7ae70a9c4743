"""Measures the quality table, and writes its section of docs/sparsity.md and the plot from it.

python tests/bench/quality.py --measure --text-dir NOVELS   # every part; again to go on
python tests/bench/quality.py --measure --text-dir NOVELS --parts prefill   # sparse prompts
python tests/bench/quality.py                               # docs/sparsity.md, quality.svg
python tests/bench/quality.py --check   # 1 when the page is not what would be written

The folder of --text-dir has novels as .txt files, which the part `text` predicts; all other
documents are of generated prose. Contexts of 16K and more want a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the script also runs uninstalled

from service.eval.plot import draw  # noqa: E402
from service.eval.record import Record  # noqa: E402
from tests.bench.quality_tables import prompt_table, tables  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.eval.cell import Cell


@dataclass(frozen=True, slots=True)
class Part:
    """Some cells of the table: every task at every context, under the same policies.

    Attributes:
        name: for --parts; several may share one.
        documents: fewest a cell.
        answers: fewest a cell; more documents where these have few questions.
        own_text: whether its text is that of --text-dir.
    """

    name: str
    tasks: tuple[str, ...]
    contexts: tuple[int, ...]
    policies: tuple[str, ...]
    documents: int = 100
    answers: int = 1000
    own_text: bool = False


SOME = ("multi-key", "multi-value", "multi-query-4", "multi-query-16", "variables")
DYNAMIC = ("dense", "dynamic:coverage=0.98")
WINDOW = {32_768: "fixed:sinks:16+window:768", 65_536: "fixed:sinks:16+window:832"}
"""Fixed windows of as many keys as the dynamic policy reads there."""
PLAIN = "sampled=false,dense_layers=1"
TOP = (f"dynamic:k=160,{PLAIN}", f"dynamic:k=160,{PLAIN},min_coverage=0.9")
"""Plain top-k as others serve it, its first layer dense; and with escalation to dense attention."""
MORE = tuple(f"dynamic:k={k},{PLAIN}" for k in (112, 128, 144, 192, 256, 384))
"""The same at other budgets, for the curve."""
BUDGETS = (*(f"dynamic:k={2**power}" for power in range(6, 13)), "dynamic:k=512,sampled=false")
SPARSE_PROMPT = ("dense", "dynamic:coverage=0.98,prefill=dynamic")
"""The document before the questions attends sparsely, too."""
HARDEST = ("multi-key", 65_536)
SHORT, LONG, PREFILLED = (4096, 8192, 16_384), tuple(WINDOW), (16_384, 32_768)

PARTS = (
    *(
        # Dense attention answers so nearly 99% of the longest that 100 documents do not tell.
        Part("sparsity", (task,), (n,), (*DYNAMIC, w), 250 if (task, n) == HARDEST else 100)
        for n, w in WINDOW.items()
        for task in SOME
    ),
    *(Part("majority", ("majority",), (n,), (*DYNAMIC, w, *TOP)) for n, w in WINDOW.items()),
    Part(
        "majority",
        ("majority",),
        LONG,
        (*MORE, "dynamic:k=384,sampled=false"),
        documents=64,
        answers=0,
    ),
    Part("dense", ("needle",), SHORT, ("dense",), documents=200, answers=0),
    Part("dense", SOME, SHORT, ("dense",)),
    Part("dense", ("majority",), SHORT, ("dense",), documents=64, answers=0),
    Part("text", ("text",), (2048, 32_768), DYNAMIC, own_text=True),
    Part("text", ("repeats",), (32_768,), DYNAMIC, own_text=True),
    Part("text", ("free-text",), (2048, 32_768), DYNAMIC, own_text=True),
    Part("prefill", (*SOME, "majority"), PREFILLED, SPARSE_PROMPT),
    Part("prefill", ("text",), PREFILLED, SPARSE_PROMPT, own_text=True),
    # Not beside dense: so few documents say nothing of a loss, and much of the estimates.
    Part("calibration", ("needle", *SOME, "majority"), LONG, BUDGETS, documents=12, answers=0),
    # Last, since one question a document makes a thousand of them.
    *(Part("needle", ("needle",), (n,), (*DYNAMIC, w)) for n, w in WINDOW.items()),
)
QUESTIONS, SEED = 10, 0

MODEL = ROOT / "models/checkpoints/saccade-12m"
PAGE = ROOT / "docs/sparsity.md"
RESULTS = ROOT / "tests/bench/results/quality.json"
PROMPTS = RESULTS.with_name("quality-prefill.json")
"""Of the part `prefill`, which measures dense attention beside it, on the same machine."""
PLOT = RESULTS.with_suffix(".svg")
BEGIN = "<!-- quality: written by tests/bench/quality.py -->"
END = "<!-- end of quality -->"
UNTOLD = ("--output", "--commit", "--plot")  # options that say nothing about the numbers


def section(saved: dict[str, Any], prompts: dict[str, Any] | None = None) -> str:
    """The section's text, markers not included.

    Args:
        saved: the results.
        prompts: those of the part `prefill`, if there are any.
    """
    settings, torch = saved["settings"], saved["versions"]["torch"]
    records = [Record(**record) for record in saved["records"]]
    first, *rest = tables(records)
    sparse = [Record(**record) for record in prompts["records"]] if prompts is not None else []
    if prompts is not None:
        first = f"{first}\n\n{prompt_table(sparse)}\n\n({_made(sparse)}, {prompts['date']}.)"
    parts = [
        first,
        f"![Accuracy against density]({_from_page(PLOT)})",
        *rest,
        _missing([*records, *sparse]),
        f"```sh\n{_command(saved['command'])}\n```",
        f"({_made(records)}, torch {torch}, {saved['date']}, seed {settings['seed']}; every row, "
        f"with its interval:\n[{RESULTS.name}]({_from_page(RESULTS)}).)",
    ]
    return "\n\n".join(part for part in parts if part)


def _from_page(file: Path) -> str:
    return Path(os.path.relpath(file, PAGE.parent)).as_posix()


def _made(records: Sequence[Record]) -> str:
    return "; ".join(dict.fromkeys(f"{r.machine}, commit {r.commit}" for r in records))


def _missing(records: Sequence[Record]) -> str:
    """What the command measures and the results do not hold yet."""
    found = {(r.task, r.context, r.policy) for r in records}
    missing: dict[tuple[str, str], list[int]] = defaultdict(list)
    for part in PARTS:
        for context in part.contexts:
            for task in part.tasks:
                if not found.issuperset((task, context, policy) for policy in part.policies):
                    missing[part.name, task].append(context)
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (name, task), contexts in missing.items():
        alike[name, tuple(sorted(contexts))].append(f"`{task}`")
    named = [
        f"{name}, {', '.join(tasks)} at {' and '.join(f'{n:,}' for n in contexts)}"
        for (name, contexts), tasks in alike.items()
    ]
    if not named:
        return ""
    lines = ";\n".join(named)
    return f"Not measured yet, of the command's parts:\n{lines}."


def rendered(page: str, saved: dict[str, Any], prompts: dict[str, Any] | None = None) -> str:
    """The page with its section anew.

    Raises:
        SystemExit: the page has no markers.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{PAGE.name} must hold the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{section(saved, prompts)}\n{END}{tail}"


def cells_of(parts: Sequence[Part], questions: int = QUESTIONS) -> list[Cell]:
    """What the parts measure, in order."""
    from service.eval.cell import Cell, documents_for
    from service.eval.policies import parse_policy
    from service.sparsity import SparsityConfig

    return [
        Cell(
            task,
            context,
            documents_for(task, part.documents, questions, part.answers),
            tuple(parse_policy(policy, SparsityConfig()) for policy in part.policies),
            part.own_text,
        )
        for part in parts
        for context in part.contexts
        for task in part.tasks
    ]


def measure(options: argparse.Namespace) -> None:
    """Fill in what the results file does not have, as `saccade eval` does.

    Raises:
        SaccadeError: one sentence on what went wrong.
    """
    # Late: whoever only renders, or draws documents, needs no model.
    import torch

    from service.engine.build import device_name, machine_name
    from service.eval.evaluation import Evaluation, texts_of
    from service.eval.policies import selections_of
    from service.eval.results import Results, table
    from service.sparsity import SparsityConfig

    device = torch.device(device_name(options.device))
    evaluation = Evaluation(
        model=options.model,
        device=device,
        questions=QUESTIONS,
        seed=SEED,
        texts=texts_of(options.text_dir),
        workers=options.workers,
        drawers=options.drawers,
    )
    results = Results.start(
        options.output,
        shlex.join(["python", "tests/bench/quality.py", *sys.argv[1:]]),
        evaluation.settings(options.model.name, options.text_dir, SparsityConfig()),
        options.commit,
        machine_name(device),
        selections_of(policy for cell in cells_of(PARTS) for policy in cell.policies),
    )
    parts = [part for part in PARTS if part.name in options.parts.split(",")]
    evaluation.fill(cells_of(parts), results, options.output)
    print(table(results.records))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write or check; 0 when the page is what it should be."""
    options = _options(arguments)
    if options.measure:
        from kernels.errors import SaccadeError

        try:
            measure(options)
        except SaccadeError as error:
            sys.exit(f"quality: {error}")
        return 0
    saved = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8")) if PROMPTS.exists() else None
    wanted = rendered(page, saved, prompts)
    if options.check:
        if wanted != page:
            print("docs/sparsity.md is not what the results say: python tests/bench/quality.py")
        return int(wanted != page)
    PAGE.write_text(wanted, encoding="utf-8")
    draw([Record(**record) for record in saved["records"]], PLOT)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    names = list(dict.fromkeys(part.name for part in PARTS))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing")
    add("--measure", action="store_true", help="run what the results file does not have yet")
    usual = ",".join(name for name in names if name != "prefill")
    add("--parts", default=usual, help=f"a list of {', '.join(names)}")
    add("--text-dir", type=Path, help="folder of novels, .txt files")
    add("--output", type=Path, help="where the results go; by default where they belong")
    add("--model", type=Path, default=MODEL, help="checkpoint folder")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--workers", type=int, default=1, help="processes, each with a model")
    add("--drawers", type=int, help="processes that draw documents")
    add("--commit", help="commit to note where there is no repository")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = PROMPTS if options.parts == "prefill" else RESULTS
    unknown = set(options.parts.split(",")) - set(names)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {names}")
    # Asked for whatever the parts: it is among the settings that all parts have in common.
    if options.measure and options.text_dir is None:
        parser.error("--measure needs a --text-dir with novels, for the part text")
    return options


def _command(typed: str) -> str:
    words = shlex.split(typed)
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before in UNTOLD or word in UNTOLD or word.partition("=")[0] in UNTOLD:
            continue
        kept.append(word)
    return shlex.join(kept)


if __name__ == "__main__":
    # Ctrl-C ends it and its processes at once; what is complete is saved.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
