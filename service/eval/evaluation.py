"""Fills in the cells that results do not have yet, saving each as it is complete."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from models.config import ModelConfig
from service.errors import ConfigError
from service.eval.drawer import Drawing
from service.eval.record import record_cell
from service.eval.tasks import MARGIN, TOKENS_A_VOTE, VOTES
from service.eval.workers import Setup, default_drawers, examine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Literal

    import torch

    from service.eval.cell import Cell
    from service.eval.record import DocumentScore
    from service.eval.results import Results
    from service.sparsity import SparsityConfig

SELDOM = 10.0
"""Seconds between two states of the progress bar where no terminal shows it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate, on what, and by how many processes.

    Attributes:
        model: checkpoint folder.
        dtype, load_format: as in the configuration.
        questions: most questions a document.
        seed: of documents and questions.
        texts: the user's own; empty for generated prose.
        workers: processes that have a model each.
        drawers: processes that draw documents; None for as many as the device needs.
    """

    model: Path
    device: torch.device
    questions: int
    seed: int
    texts: tuple[str, ...] = ()
    dtype: str = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    workers: int = 1
    drawers: int | None = None

    def settings(
        self, name: str, text_dir: Path | None, sparsity: SparsityConfig
    ) -> dict[str, Any]:
        """What records depend on besides their task, context, policy and number of documents.

        Args:
            name: the model's.
            text_dir: where the texts are from.
            sparsity: what policies leave open.
        """
        return {
            "model": name,
            "weights": fingerprint(self.model),
            "dtype": self.dtype,
            "load_format": self.load_format,
            "seed": self.seed,
            "questions": self.questions,
            "text": None if text_dir is None else text_dir.name,
            # Questions attend under their policy at any context: noted is the same number whatever
            # the device, so that an evaluation goes on on another.
            "sparsity": sparsity.model_dump(exclude_none=True, exclude={"prefill_dense_below"})
            | {"dense_below": sparsity.dense_below_on("cpu")},
            "majority": {"margin": MARGIN, "votes": VOTES, "tokens_a_vote": TOKENS_A_VOTE},
        }

    def fill(self, cells: Sequence[Cell], results: Results, output: Path | None) -> None:
        """Measure the cells that the results do not have.

        Raises:
            SaccadeError: a document failed, a process died, or the model holds no such context.
        """
        wanted = [cell for cell in dict.fromkeys(cells) if not results.has(cell)]
        if not wanted:
            return
        longest = max(cell.context for cell in wanted)
        ModelConfig.from_folder(self.model).resolve_max_model_len(longest)
        setup = Setup(self.model, self.dtype, self.load_format, longest)
        drawing = Drawing(self.model, self.questions, self.seed, self.texts)
        drawers = self.drawers
        if drawers is None:
            drawers = default_drawers(self.device, self.workers)
        filled: dict[Cell, dict[int, list[DocumentScore]]] = defaultdict(dict)
        often = 0.1 if sys.stderr.isatty() else SELDOM
        count = sum(cell.documents for cell in wanted)
        with tqdm(total=count, unit="document", mininterval=often) as progress:
            for item, scores in examine(setup, drawing, wanted, self.device, self.workers, drawers):
                cell = item.cell
                filled[cell][item.document] = scores
                progress.set_description(f"{cell.task} {cell.context}", refresh=False)
                progress.update()
                if len(filled[cell]) == cell.documents:
                    # By number: the faster of two workers must not change the sums.
                    ordered = [one for _, one in sorted(filled.pop(cell).items())]
                    records = record_cell(cell.task, cell.context, ordered, passages=cell.passages)
                    results.add([replace(r, own_text=cell.own_text) for r in records])
                    if output is not None:
                        results.save(output)


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint from another of its name: of its files' sizes and first mebibytes."""
    found = sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with file.open("rb") as opened:
            found.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 20))
    return found.hexdigest()[:16]


def texts_of(folder: Path | None) -> tuple[str, ...]:
    """The .txt files of a folder, in order of their names.

    Raises:
        ConfigError: there are none, or one is not UTF-8.
    """
    if folder is None:
        return ()
    try:
        texts = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt"))]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text-dir {folder} holds a file that is not UTF-8 text") from error
    if not texts:
        raise ConfigError(f"--text-dir {folder} holds no .txt file")
    return tuple(texts)
