"""The training loop: steps on a clock, checks, saves, and the export at the end."""

from __future__ import annotations

import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from models.training.batches import Loader
from models.training.checks import check
from models.training.journal import Journal
from models.training.mover import Mover
from models.training.pieces import ANSWER, TEXT
from models.training.ranks import Ranks
from models.training.run import Run
from models.training.schedule import Schedule
from models.training.start import LOG
from models.training.warm_up import warm_up

if TYPE_CHECKING:
    from models.training.llama import TrainingLlama
    from models.training.mover import Moved
    from models.training.plans import Plan
    from models.training.prepare import Data
    from models.training.run import Settings

_SAVE_EVERY = 180.0  # seconds of wall clock
_REPORT_EVERY = 60.0  # seconds of training
_CHECKED = (4096, 16_384)  # lengths of the last check, whether or not a stage ends with them
_RESERVE = 12.0  # seconds of a piece kept for stopping and saving


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
        self._run = Run(plan, data, settings, seed=seed, ranks=ranks)
        self._model, self._facts = self._run.model, self._run.facts
        self._device = self._run.device
        self._schedule = Schedule(plan, self._facts, text_tokens=data.tokens, ranks=ranks)
        self._stop = False
        self._saved = time.monotonic()
        self._journal = Journal(
            settings.state / LOG, self._facts, text_tokens=data.tokens, device=self._device
        )

    def run(self) -> bool:
        """Trains until the plan or the piece ends; true when the plan has ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._ranks.meet()  # all have read the state before the first writes it anew
        if self._ranks.first and self._run.earlier_log is not None:
            self._journal.begin(self._run.earlier_log)
        if not self._run.finished:
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
            return self._run.finished
        self.save()
        if self._run.finished:
            if self._run.blend():
                self._journal.record({"step": self._facts["step"], "blend": self._plan.blend})
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
        return self._run.finished

    def save(self) -> None:
        """Writes the state folder."""
        self._run.save()
        self._saved = time.monotonic()

    def export(self) -> None:
        """Writes the checkpoint folder."""
        self._run.export(log=self._journal.path)

    @property
    def model(self) -> TrainingLlama:
        """The model as trained so far."""
        return self._model

    @property
    def facts(self) -> dict[str, Any]:
        """The run's numbers so far."""
        return dict(self._facts)

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
            self._run.optimiser.step(plan.rate(progress, facts["step"]))
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
                self._run.finished
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
