"""A run: the weights, the optimiser's state and the numbers that its pieces hand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from models.training.checkpoint import write_checkpoint
from models.training.errors import TrainingError
from models.training.llama import TrainingLlama
from models.training.optimiser import Optimiser
from models.training.start import blend_weights, read_start, take_weights
from models.training.state import load_state, save_state

if TYPE_CHECKING:
    from pathlib import Path

    from models.training.plans import Plan
    from models.training.prepare import Data
    from models.training.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Settings:
    """How one piece of a run is to be run; nothing here changes the result of the whole."""

    out: Path
    state: Path
    deadline: float  # of the piece, on time.monotonic
    workers: int  # of each rank
    compile_parts: bool
    steps: int | None = None  # stop the piece after so many steps
    max_shard: int | None = None  # bytes of a weight file of the checkpoint
    start: Path | None = None  # checkpoint folder that the run begins from


class Run:
    """What of a run outlives a piece: resumed from its state folder where there is one.

    Raises:
        TrainingError: the state is another plan's, or the plan needs a start that is not named.
    """

    def __init__(
        self, plan: Plan, data: Data, settings: Settings, *, seed: int, ranks: Ranks
    ) -> None:
        self._plan, self._data, self._settings = plan, data, settings
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", ranks.rank) if cuda else torch.device("cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        self.model = TrainingLlama(plan.shape, dtype=dtype, seed=seed).to(self.device)
        self.optimiser = Optimiser(self.model, muon_rate=plan.muon_rate, adam_rate=plan.adam_rate)
        self.facts: dict[str, Any] = {
            "plan": plan.name,
            "seed": seed,
            "step": 0,
            "batch": 0,
            "clock": 0.0,  # seconds of training
            "tokens_seen": 0,
            "text_tokens_seen": 0,  # with loss
            "text_rate": 0.0,  # text tokens a second that could have carried loss, lately
            "rate_clock": 0.0,
            "rate_text": 0.0,
            "rate_batches": 0,
            "rate_all": 0,
            "longest": 0,
            "stages_done": 0,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "start": [],  # runs that made the weights which this one began with
        }
        self.earlier_log: str | None = None  # of a new run: the log that its own goes on from
        self._resume()
        if plan.blend < 1 and "blend" not in self.facts:
            self._check_start()
        device = torch.cuda.get_device_name() if cuda else "CPU"
        self.facts |= {
            "device": f"{ranks.world} x {device}" if ranks.world > 1 else device,
            "text_files": data.files,
            "text_bytes": data.size,
            "text_tokens": data.tokens,
        }

    @property
    def finished(self) -> bool:
        """Whether the plan's training time is used up."""
        return bool(self.facts["clock"] >= self._plan.seconds)

    def save(self) -> None:
        """Writes the state folder."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        save_state(self._settings.state, tensors | self.optimiser.state(), self.facts)

    def export(self, log: Path) -> None:
        """Writes the checkpoint folder, with the journal's file."""
        write_checkpoint(
            self._settings.out,
            dict(self.model.named_parameters()),
            self._plan.shape,
            tokenizer=self._data.tokenizer,
            log=log,
            facts=self.facts,
            max_length=self.facts["longest"] or self._plan.stages[0].length,
            max_shard=self._settings.max_shard,
        )
        print(f"checkpoint written to {self._settings.out}")

    def blend(self) -> bool:
        """Keeps the plan's share of what changed since the start; once, whoever ends the run.

        Returns:
            Whether anything was blended.
        """
        share, folder = self._plan.blend, self._settings.start
        if share == 1.0 or "blend" in self.facts:
            return False
        assert folder is not None  # checked before the training
        start = read_start(folder, self._plan.shape)
        blend_weights(dict(self.model.named_parameters()), start.weights, share)
        self.facts["blend"] = share
        return True

    def _resume(self) -> None:
        loaded = load_state(self._settings.state)
        if loaded is None:
            self._start()
            return
        tensors, facts = loaded
        if facts["plan"] != self._plan.name:
            raise TrainingError(
                f"{self._settings.state} holds a run of plan {facts['plan']!r}: name that plan or "
                "another state folder."
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        if facts["step"]:
            self.optimiser.load_state(tensors, facts["step"])
        self.facts |= facts
        print(f"resumed at step {facts['step']}, {facts['clock']:.0f} s of training")

    def _start(self) -> None:
        self.earlier_log = ""
        folder = self._settings.start
        if folder is None:
            return
        start = read_start(folder, self._plan.shape)
        take_weights(dict(self.model.named_parameters()), start.weights, folder)
        self.facts["start"] = start.runs
        self.earlier_log = start.log
        print(f"started from the weights of {folder}")

    def _check_start(self) -> None:
        """A plan that ends near its start's weights needs them then, unchanged."""
        start, out = self._settings.start, self._settings.out
        if start is None or start.resolve() == out.resolve():
            raise TrainingError(
                f"The plan {self._plan.name!r} ends near its start's weights: name them with "
                "--start at every piece, and another folder with --out."
            )
