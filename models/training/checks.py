"""What is measured during training and at its end, as a line of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.training.retrieval import TASKS, bits_per_byte, retrieval_scores

if TYPE_CHECKING:
    from models.training.llama import TrainingLlama
    from models.training.prepare import Data


def check(
    model: TrainingLlama,
    data: Data,
    lengths: tuple[int, ...],
    *,
    tasks: tuple[str, ...] = TASKS,
    tokens: int = 262_144,
    final: bool = False,
) -> dict[str, Any]:
    """Retrieval at `lengths` (ascending) and bits per byte, from about `tokens` tokens each.

    The final check asks four times as many questions and reads windows of the longest length too.
    """
    scores = retrieval_scores(
        model, data.builder, lengths, tasks=tasks, tokens=4 * tokens if final else tokens
    )
    windows = {min(2048, lengths[-1])} | ({lengths[-1]} if final else set())
    bits = {
        str(n): round(bits_per_byte(model, data.validation, data.sizes, length=n, tokens=tokens), 4)
        for n in sorted(windows)
    }
    retrieval = [
        {"task": s.task, "length": s.length, "share": round(s.share, 4), "asked": s.asked}
        for s in scores
    ]
    return {"retrieval": retrieval, "bits_per_byte": bits}
