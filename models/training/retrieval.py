"""Checks during training: retrieval by length and task, and bits per byte of unseen text.

Words, texts and values are unseen. A question counts as answered when every digit of its answer
is the most likely token given the ones before it, which is what greedy decoding needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.training.pieces import ANSWER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.training.corpus import Corpus
    from models.training.examples import ExampleBuilder
    from models.training.llama import TrainingLlama
    from models.training.pieces import Example

TASKS = (
    "single",
    "needles16",
    "needles64",
    "key_value",
    "multi_value",
    "multi_query4",
    "multi_query16",
    "variables",
    "majority",
)
MARGIN = 0.1
"""Difference of the votes' shares in the check on majorities."""


@dataclass(frozen=True, slots=True)
class Score:
    """Answered questions of one task at one length."""

    task: str
    length: int
    right: int
    asked: int

    @property
    def share(self) -> float:
        """Exact matches over questions."""
        return self.right / max(1, self.asked)


def _draw(builder: ExampleBuilder, task: str, length: int, number: int) -> Example:
    rng = np.random.default_rng([TASKS.index(task), length, number])
    if task == "key_value":
        return builder.key_value(rng, length + 1)
    if task == "multi_value":
        return builder.needles(rng, length + 1, count=4, values=4)
    if task == "variables":
        return builder.variables(rng, length + 1, text_loss=False, whole=True)
    if task == "majority":
        return builder.majority(rng, length + 1, text_loss=False, ballots=4, margin=MARGIN)
    if task.startswith("multi_query"):
        count = int(task.removeprefix("multi_query"))
        return builder.several(rng, length + 1, text_loss=False, count=count)
    count = {"single": 1, "needles16": 16, "needles64": 64}[task]
    return builder.needles(rng, length + 1, count=count, asked=16)


def _as_tensors(rows: Sequence[npt.NDArray[np.uint16]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # [rows, length + 1]


def retrieval_scores(
    model: TrainingLlama,
    builder: ExampleBuilder,
    lengths: Sequence[int],
    *,
    tasks: Sequence[str] = TASKS,
    tokens: int = 524_288,
) -> list[Score]:
    """Scores of each task at each length, from `tokens` tokens or 64 sequences each."""
    device = model.embed.device
    scores = []
    for length in lengths:
        count = max(4, min(64, tokens // length))
        rows = max(1, 65_536 // length)
        for task in tasks:
            if task == "needles64" and length < 8192:
                continue
            examples = [_draw(builder, task, length, number) for number in range(count)]
            right = asked = 0
            for start in range(0, count, rows):
                part = examples[start : start + rows]
                ids = _as_tensors([e.tokens for e in part], device)
                with model.attention.context():
                    _, hits = model.evaluate(ids[:, :-1], ids[:, 1:])
                for row, example in zip(hits.cpu().numpy(), part, strict=True):
                    runs = _answers(example.kinds[1:])
                    right += sum(bool(row[first:stop].all()) for first, stop in runs)
                    asked += len(runs)
            scores.append(Score(task, length, right, asked))
    return scores


def _answers(kinds: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Ranges of consecutive answer tokens."""
    marked = np.concatenate([[0], (kinds == ANSWER).astype(np.int8), [0]])  # [length + 2]
    edges = np.diff(marked)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def bits_per_byte(
    model: TrainingLlama,
    corpus: Corpus,
    sizes: npt.NDArray[np.int64],
    *,
    length: int,
    tokens: int = 262_144,
) -> float:
    """Bits per byte over evenly spaced windows of a text.

    Each window starts after `<|bos|>`; `sizes` holds the bytes of each token id.
    """
    length = min(length, len(corpus.tokens) - 1)
    count = max(1, min(tokens, len(corpus.tokens) - 1) // length)
    last = len(corpus.tokens) - length
    starts = np.linspace(0, last, count).astype(np.int64)
    device = model.embed.device
    rows = max(1, 65_536 // length)
    nats, size = 0.0, 0
    for first in range(0, count, rows):
        windows = [corpus.tokens[s : s + length] for s in starts[first : first + rows]]
        ids = _as_tensors([np.concatenate([[0], window]) for window in windows], device)
        with model.attention.context():
            losses, _ = model.evaluate(ids[:, :-1], ids[:, 1:])
        nats += float(losses.double().sum())
        size += int(sum(sizes[window].sum() for window in windows))
    return nats / math.log(2) / max(1, size)
