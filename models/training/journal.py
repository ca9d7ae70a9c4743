"""The run's record, training_log.jsonl, and what it sums up between two reports."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from models.training.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class Journal:
    """Lines of JSON: of each run one that names its plan, then reports and checks."""

    def __init__(
        self, path: Path, facts: Mapping[str, Any], *, text_tokens: int, device: torch.device
    ) -> None:
        self._path, self._facts, self._text_tokens = path, facts, text_tokens
        self._device = device
        self.waited = 0.0  # seconds for data since the last report
        self._losses = torch.zeros(4, device=device)  # text loss, count, answer loss, count
        self.restart()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def seconds(self) -> float:
        """Training time since the last report."""
        return float(self._facts["clock"] - self._clock)

    def begin(self, earlier: str) -> None:
        """Starts a new run's file with the one of the runs before and this one's name."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if earlier and not earlier.endswith("\n"):
            earlier += "\n"
        self._path.write_text(earlier, encoding="utf-8")
        self.record({"step": 0, "plan": self._facts["plan"], "device": self._facts["device"]})

    def restart(self) -> None:
        """Speed is measured from now on."""
        self._clock: float = self._facts["clock"]
        self._tokens: int = self._facts["tokens_seen"]
        self._wall = time.perf_counter()
        self.waited = 0.0

    def add(self, losses: Tensor) -> None:
        """Adds text loss, its tokens, answer loss, its tokens: float32 [4] on the device."""
        self._losses += losses

    def report(self, **more: float) -> None:
        """Records speed and losses (of this rank's batches) since the last report.

        Raises:
            TrainingError: the loss is not finite.
        """
        text, text_count, answer, answer_count = self._losses.tolist()
        self._losses.zero_()
        facts = self._facts
        seconds = max(1e-9, time.perf_counter() - self._wall)
        line = {
            "step": facts["step"],
            "clock": round(facts["clock"], 1),
            "tokens": facts["tokens_seen"],
            "longest": facts["longest"],
            "text_loss": round(text / max(1, text_count), 4),
            "answer_loss": round(answer / max(1, answer_count), 4),
            "tokens_per_second": round((facts["tokens_seen"] - self._tokens) / seconds),
            "waited_for_data": round(self.waited, 2),
            "text_epochs": round(facts["text_tokens_seen"] / self._text_tokens, 2),
        }
        if self._device.type == "cuda":
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        self.record(line | more)
        if not math.isfinite(text + answer):
            raise TrainingError(
                "The loss is not finite: start again with another seed or lower rates in the plan."
            )

    def record(self, line: Mapping[str, Any]) -> None:
        """Appends a line and shows it."""
        text = json.dumps(line)
        tqdm.write(text)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as log:
            log.write(text + "\n")
