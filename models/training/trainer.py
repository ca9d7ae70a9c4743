"""The training loop: steps on a clock, checks, saves, and the export at the end."""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from models.training.batches import Loader
from models.training.checkpoint import write_checkpoint
from models.training.checks import check
from models.training.errors import TrainingError
from models.training.journal import Journal
from models.training.llama import TrainingLlama
from models.training.mover import Mover
from models.training.optimiser import Optimiser
from models.training.pieces import ANSWER, TEXT
from models.training.ranks import Ranks
from models.training.schedule import Schedule
from models.training.start import LOG, blend_weights, read_start, take_weights
from models.training.state import load_state, save_state
from models.training.warm_up import warm_up

if TYPE_CHECKING:
    from pathlib import Path

    from models.training.mover import Moved
    from models.training.plans import Plan
    from models.training.prepare import Data

_SAVE_EVERY = 180.0  # seconds of wall clock
_REPORT_EVERY = 60.0  # seconds of training
_CHECKED = (4096, 16_384)  # lengths of the last check, whether or not a stage ends with them
_RESERVE = 12.0  # seconds of a piece kept for stopping and saving


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


class Trainer:
    """One run, resumed from its state folder where there is one.

    Of several ranks each has one, with the same weights; the first rank's keeps the clock, decides
    when to stop, and alone writes files and output.
    """

    def __init__(
        self,
        plan: Plan,
        data: Data,
        settings: Settings,
        *,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self._plan, self._data, self._settings = plan, data, settings
        self._ranks = ranks = ranks or Ranks()
        cuda = torch.cuda.is_available()
        self._device = torch.device("cuda", ranks.rank) if cuda else torch.device("cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        self._model = TrainingLlama(plan.shape, dtype=dtype, seed=seed).to(self._device)
        self._optimiser = Optimiser(self._model, muon_rate=plan.muon_rate, adam_rate=plan.adam_rate)
        self._facts: dict[str, Any] = {
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
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "start": [],  # runs that made the weights which this one began with
        }
        self._earlier_log: str | None = None  # of a new run: the log that its own goes on from
        self._resume()
        if plan.blend < 1 and "blend" not in self._facts:
            self._check_start()
        device = torch.cuda.get_device_name() if cuda else "CPU"
        self._facts |= {
            "device": f"{ranks.world} x {device}" if ranks.world > 1 else device,
            "text_files": data.files,
            "text_bytes": data.size,
            "text_tokens": data.tokens,
        }
        self._schedule = Schedule(plan, self._facts, text_tokens=data.tokens, ranks=ranks)
        self._stop = False
        self._saved = time.monotonic()
        self._journal = Journal(
            settings.state / LOG, self._facts, text_tokens=data.tokens, device=self._device
        )

    @property
    def finished(self) -> bool:
        """Whether the plan's training time is used up."""
        return bool(self._facts["clock"] >= self._plan.seconds)

    def run(self) -> bool:
        """Trains until the plan or the piece ends; true when the plan has ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._ranks.meet()  # all have read the state before the first writes it anew
        if self._ranks.first and self._earlier_log is not None:
            self._journal.begin(self._earlier_log)
        if not self.finished:
            loader = Loader(
                self._data.folder,
                workers=self._settings.workers,
                seed=self._facts["seed"] + 1,
                mix=self._plan.mix,
                move=Mover(self._device),
            )
            try:
                warm_up(self._model, self._plan, compile_parts=self._settings.compile_parts)
                self._train(loader)
            finally:
                loader.close()
        self._ranks.leave()
        if not self._ranks.first:
            return self.finished
        self.save()
        if self.finished:
            self._blend()
            self.save()  # blended: what goes on from here must not blend again
            self.export()  # first without a last check, so that a cut piece leaves a checkpoint
            if self._settings.deadline - time.monotonic() > 0:
                self._check(self._lengths(), final=True)
                self.save()
                self.export()
            else:
                print("no time left for the last check: run the same command again for it")
        else:
            print(
                f"piece ended at {self._facts['clock']:.0f} of {self._plan.seconds:.0f} s of "
                "training: run the same command again to go on"
            )
        return self.finished

    def save(self) -> None:
        """Writes the state folder."""
        tensors = {f"model.{name}": p for name, p in self._model.named_parameters()}
        save_state(self._settings.state, tensors | self._optimiser.state(), self._facts)
        self._saved = time.monotonic()

    def export(self) -> None:
        """Writes the checkpoint folder."""
        write_checkpoint(
            self._settings.out,
            dict(self._model.named_parameters()),
            self._plan.shape,
            tokenizer=self._data.tokenizer,
            log=self._journal.path,
            facts=self._facts,
            max_length=self._facts["longest"] or self._plan.stages[0].length,
            max_shard=self._settings.max_shard,
        )
        print(f"checkpoint written to {self._settings.out}")

    @property
    def model(self) -> TrainingLlama:
        """The model as trained so far."""
        return self._model

    @property
    def facts(self) -> dict[str, Any]:
        """The run's numbers so far."""
        return dict(self._facts)

    # -- start -----------------------------------------------------------------------------------

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
            for name, parameter in self._model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        if facts["step"]:
            self._optimiser.load_state(tensors, facts["step"])
        self._facts |= facts
        print(f"resumed at step {facts['step']}, {facts['clock']:.0f} s of training")

    def _start(self) -> None:
        self._earlier_log = ""
        folder = self._settings.start
        if folder is None:
            return
        start = read_start(folder, self._plan.shape)
        take_weights(dict(self._model.named_parameters()), start.weights, folder)
        self._facts["start"] = start.runs
        self._earlier_log = start.log
        print(f"started from the weights of {folder}")

    def _check_start(self) -> None:
        """A plan that ends near its start's weights needs them then, unchanged."""
        start, out = self._settings.start, self._settings.out
        if start is None or start.resolve() == out.resolve():
            raise TrainingError(
                f"The plan {self._plan.name!r} ends near its start's weights: name them with "
                "--start at every piece, and another folder with --out."
            )

    def _blend(self) -> None:
        """Keep the plan's share of the change; once, whoever ends the run."""
        share, folder = self._plan.blend, self._settings.start
        if share == 1.0 or "blend" in self._facts:
            return
        assert folder is not None  # checked before the training
        start = read_start(folder, self._plan.shape)
        blend_weights(dict(self._model.named_parameters()), start.weights, share)
        self._facts["blend"] = share
        self._journal.record({"step": self._facts["step"], "blend": share})

    # -- loop ------------------------------------------------------------------------------------

    def _train(self, loader: Loader) -> None:
        plan, facts, settings = self._plan, self._facts, self._settings
        events: deque[torch.cuda.Event] = deque()
        steps_left = settings.steps if settings.steps is not None else -1
        self._ranks.meet()  # a rank that compiled longer is not on the clock
        self._journal.restart()
        bar = tqdm(
            total=round(plan.seconds),
            initial=round(facts["clock"]),
            unit="s",
            mininterval=5,
            disable=not self._ranks.first,
        )
        mark = time.perf_counter()
        while self._goes_on(steps_left):
            progress = facts["clock"] / plan.seconds
            halves = 2 if progress >= 0.5 else 1
            for _ in range(halves):
                self._schedule.ask(loader, progress)
                before = time.perf_counter()
                moved = loader.take()
                self._journal.waited += time.perf_counter() - before
                self._backward(moved, halves=halves)
                self._schedule.count(moved.batch)
            self._ranks.add_gradients(self._model.parameters())
            self._optimiser.step(plan.rate(progress, facts["step"]))
            facts["step"] += 1
            steps_left -= 1
            if self._device.type == "cuda":
                # The host stays at most two steps ahead, so that its clock is the device's.
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                events.append(event)
                if len(events) > 2:
                    events.popleft().synchronize()
            if not self._ranks.first:
                continue
            now = time.perf_counter()
            facts["clock"] += now - mark
            bar.update(max(0.0, min(now - mark, plan.seconds - bar.n)))
            mark = now
            if self._look():
                mark = time.perf_counter()
        bar.close()
        difference = self._ranks.difference(self._model.parameters())
        if self._ranks.first:
            more = {"rank_difference": difference} if self._ranks.world > 1 else {}
            self._journal.report(**more)

    def _goes_on(self, steps_left: int) -> bool:
        """Whether another step follows; one answer, one clock and one count for all ranks."""
        facts, first = self._facts, self._ranks.first
        over = self._stop or (
            first
            and (
                self.finished
                or steps_left == 0
                or time.monotonic() > self._settings.deadline - _RESERVE
            )
        )
        clock = facts["clock"] if first else 0.0
        clock, stops, *taken = self._ranks.total([clock, float(over), *self._schedule.taken()])
        facts["clock"] = clock
        self._schedule.settle(taken)
        return not stops

    def _look(self) -> bool:
        """Reports, checks and saves where it is time to; whether it was."""
        plan, facts = self._plan, self._facts
        stage_ended = (
            facts["stages_done"] < len(plan.stages) - 1
            and facts["clock"] / plan.seconds >= plan.stages[facts["stages_done"]].until
        )
        reports = stage_ended or self._journal.seconds >= _REPORT_EVERY
        saves = time.monotonic() - self._saved >= _SAVE_EVERY
        if reports:
            self._journal.report()
            if stage_ended:
                facts["stages_done"] += 1
                self._check((facts["longest"],))
            else:
                self._check((facts["longest"],), tasks=("needles16",), tokens=131_072)
        if saves:
            self.save()
        if reports:
            self._journal.restart()
        return reports or saves

    def _backward(self, moved: Moved, *, halves: int) -> None:
        moved.wait()
        kinds = moved.kinds[:, 1:].reshape(-1)  # [tokens]
        with self._model.attention.context():
            losses = self._model.losses(moved.tokens[:, :-1], moved.tokens[:, 1:])  # [tokens]
            counted, answers = kinds > 0, kinds == ANSWER
            # A batch with little loss on text is not scaled up to a full one's weight.
            mean = (losses * counted).sum() / counted.sum().clamp_min(len(kinds) // 8)
            extra = (losses * answers).sum() / answers.sum().clamp_min(300)
            # Over ranks gradients are added up: the share makes their sum the mean.
            torch.autograd.backward((mean + 0.5 * extra) / (halves * self._ranks.world))
        with torch.no_grad():
            text = kinds == TEXT
            self._journal.add(
                torch.stack(
                    [(losses * text).sum(), text.sum(), (losses * answers).sum(), answers.sum()]
                )
            )

    # -- checks ----------------------------------------------------------------------------------

    def _lengths(self) -> tuple[int, ...]:
        longest = self._facts["longest"]
        lengths = {*_CHECKED, *(stage.length for stage in self._plan.stages), longest}
        return tuple(sorted(n for n in lengths if 0 < n <= longest))

    def _check(self, lengths: tuple[int, ...], *, final: bool = False, **options: Any) -> None:
        start = time.perf_counter()
        found = check(self._model, self._data, lengths, final=final, **options)
        self._journal.record(
            {"step": self._facts["step"], **found, "seconds": time.perf_counter() - start}
        )
        if final:
            self._facts |= found

    def _on_signal(self, *_: object) -> None:
        self._stop = True
