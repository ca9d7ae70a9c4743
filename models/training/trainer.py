"""The training loop: steps on a clock, checks, saves, and the export at the end."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.training.attention import choose_attention
from models.training.batches import Batch, Loader, Request
from models.training.checkpoint import write_checkpoint
from models.training.errors import TrainingError
from models.training.llama import TrainingLlama
from models.training.optimiser import Optimiser
from models.training.pieces import ANSWER, TEXT
from models.training.retrieval import TASKS, bits_per_byte, retrieval_scores
from models.training.state import load_state, save_state

if TYPE_CHECKING:
    from pathlib import Path

    from models.training.plans import Plan
    from models.training.prepare import Data

_SAVE_EVERY = 180.0  # seconds of wall clock
_REPORT_EVERY = 60.0  # seconds of training
_RESERVE = 12.0  # seconds of a piece kept for stopping and saving
_AHEAD = 24  # batches asked for before they are needed


@dataclass(frozen=True, slots=True)
class Settings:
    """How one piece of a run is to be run; nothing here changes the result of the whole."""

    out: Path
    state: Path
    deadline: float  # of the piece, on time.monotonic
    workers: int
    compile_parts: bool
    steps: int | None = None  # stop the piece after so many steps
    max_shard: int | None = None  # bytes of a weight file of the checkpoint


@dataclass(frozen=True, slots=True)
class _Moved:
    """A batch on the device."""

    batch: Batch
    tokens: Tensor  # int64 [rows, length + 1]
    kinds: Tensor  # uint8 [rows, length + 1]
    copied: torch.cuda.Event | None


class Trainer:
    """One run, resumed from its state folder where there is one."""

    def __init__(self, plan: Plan, data: Data, settings: Settings, *, seed: int = 0) -> None:
        self._plan, self._data, self._settings = plan, data, settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self._device.type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        self._model = TrainingLlama(plan.shape, dtype=dtype, seed=seed).to(self._device)
        self._optimiser = Optimiser(self._model, muon_rate=plan.muon_rate, adam_rate=plan.adam_rate)
        self._copies = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
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
        }
        self._resume()
        self._facts |= {
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "text_files": data.files,
            "text_bytes": data.size,
            "text_tokens": data.tokens,
        }
        self._asked = self._facts["batch"]
        self._stop = False
        self._log = settings.state / "training_log.jsonl"
        self._sums = torch.zeros(4, device=self._device)  # text loss, count, answer loss, count

    @property
    def finished(self) -> bool:
        """Whether the plan's training time is used up."""
        return bool(self._facts["clock"] >= self._plan.seconds)

    def run(self) -> bool:
        """Trains until the plan or the piece ends; true when the plan has ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if not self.finished:
            loader = Loader(
                self._data.folder,
                workers=self._settings.workers,
                seed=self._facts["seed"] + 1,
                move=self._move,
            )
            try:
                self._warm_up()
                self._train(loader)
            finally:
                loader.close()
        self.save()
        if self.finished:
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

    def export(self) -> None:
        """Writes the checkpoint folder."""
        write_checkpoint(
            self._settings.out,
            dict(self._model.named_parameters()),
            self._plan.shape,
            tokenizer=self._data.tokenizer,
            log=self._log,
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

    def _warm_up(self) -> None:
        """Chooses the attention kernel and compiles, outside the training clock."""
        start = time.perf_counter()
        self._model.attention = choose_attention(self._plan.shape, self._device, self._model.dtype)
        print(f"attention: {self._model.attention}")
        if not self._settings.compile_parts:
            return
        self._model.compile_parts()
        try:
            self._trial_step()
        except RuntimeError as error:
            print(f"compilation failed, training goes on without it: {error}")
            self._model.eager_parts()
            self._model.zero_grad(set_to_none=True)
            self._trial_step()
        print(f"compiled in {time.perf_counter() - start:.1f} s")

    def _trial_step(self) -> None:
        length = self._plan.stages[0].length
        size = (self._plan.step_tokens // length, length)
        tokens = torch.randint(8, self._plan.shape.vocab, size, device=self._device)
        with self._model.attention.context():
            for _ in range(2):
                torch.autograd.backward(self._model.losses(tokens, tokens).mean())
        self._model.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    # -- loop ------------------------------------------------------------------------------------

    def _train(self, loader: Loader) -> None:
        plan, facts, settings = self._plan, self._facts, self._settings
        events: deque[torch.cuda.Event] = deque()
        reported, saved = facts["clock"], time.monotonic()
        seen_then, wall_then = facts["tokens_seen"], time.perf_counter()
        steps_left = settings.steps if settings.steps is not None else -1
        bar = tqdm(
            total=round(plan.seconds), initial=round(facts["clock"]), unit="s", mininterval=5
        )
        waited = 0.0
        mark = time.perf_counter()
        while not self.finished and not self._stop and steps_left != 0:
            if time.monotonic() > settings.deadline - _RESERVE:
                break
            progress = facts["clock"] / plan.seconds
            for _ in range(2 if progress >= 0.5 else 1):
                self._ask(loader, progress)
                before = time.perf_counter()
                moved = loader.take()
                waited += time.perf_counter() - before
                self._backward(moved, halves=2 if progress >= 0.5 else 1)
                self._count(moved)
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
            now = time.perf_counter()
            facts["clock"] += now - mark
            bar.update(max(0.0, min(now - mark, plan.seconds - bar.n)))
            mark = now
            stage_ended = (
                facts["stages_done"] < len(plan.stages) - 1
                and facts["clock"] / plan.seconds >= plan.stages[facts["stages_done"]].until
            )
            if stage_ended or facts["clock"] - reported >= _REPORT_EVERY:
                self._report(now - wall_then, facts["tokens_seen"] - seen_then, waited)
                if stage_ended:
                    facts["stages_done"] += 1
                    self._check(self._lengths())
                else:
                    self._check((facts["longest"],), tasks=("needles16",), tokens=131_072)
                if time.monotonic() - saved >= _SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
                reported, waited = facts["clock"], 0.0
                seen_then = facts["tokens_seen"]
                mark = wall_then = time.perf_counter()
            elif time.monotonic() - saved >= _SAVE_EVERY:
                self.save()
                saved = time.monotonic()
                mark = time.perf_counter()
        bar.close()
        self._report(time.perf_counter() - wall_then, facts["tokens_seen"] - seen_then, waited)

    def _ask(self, loader: Loader, progress: float) -> None:
        plan = self._plan
        while loader.outstanding < _AHEAD:
            stage = plan.stage(progress)
            rng = np.random.default_rng([self._facts["seed"], 7, self._asked])
            length, shorter = stage.length, plan.lengths(stage)
            if shorter and rng.random() < plan.short_share:
                length = shorter[rng.integers(len(shorter))]
            share = self._text_loss_share(progress)
            loader.submit(Request(self._asked, plan.step_tokens // length, length, share))
            self._asked += 1

    def _text_loss_share(self, progress: float) -> float:
        """Share of sequences with loss on text, so that the text's passes spread over the clock.

        A tenth of the passes comes early, when the model learns the language at all.
        """
        plan, facts = self._plan, self._facts
        budget = plan.text_epochs * self._data.tokens
        if not facts["text_rate"]:
            return 0.5
        due = budget * (0.1 * min(1.0, progress / 0.03) + 0.9 * progress)
        horizon = 0.02 * plan.seconds
        wanted = (due - facts["text_tokens_seen"]) / horizon + 0.9 * budget / plan.seconds
        return float(min(1.0, max(0.02, wanted / facts["text_rate"])))

    def _count(self, moved: _Moved) -> None:
        facts, batch = self._facts, moved.batch
        facts["batch"] = batch.request.index + 1
        facts["tokens_seen"] += batch.request.rows * batch.request.length
        facts["text_tokens_seen"] += batch.text_tokens
        facts["longest"] = max(facts["longest"], batch.request.length)
        elapsed = facts["clock"] - facts["rate_clock"]
        if batch.text_share:
            facts["rate_text"] += batch.text_tokens / batch.text_share
            facts["rate_batches"] += 1
        facts["rate_all"] += 1
        if elapsed > 0.01 * self._plan.seconds and facts["rate_batches"]:
            per_batch = facts["rate_text"] / facts["rate_batches"]
            facts |= {
                "text_rate": per_batch * facts["rate_all"] / elapsed,
                "rate_clock": facts["clock"],
                "rate_text": 0.0,
                "rate_batches": 0,
                "rate_all": 0,
            }

    def _backward(self, moved: _Moved, *, halves: int) -> None:
        if moved.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(moved.copied)
            moved.tokens.record_stream(stream)
            moved.kinds.record_stream(stream)
        kinds = moved.kinds[:, 1:].reshape(-1)  # [tokens]
        with self._model.attention.context():
            losses = self._model.losses(moved.tokens[:, :-1], moved.tokens[:, 1:])  # [tokens]
            counted, answers = kinds > 0, kinds == ANSWER
            # A batch with little loss on text is not scaled up to a full one's weight.
            mean = (losses * counted).sum() / counted.sum().clamp_min(len(kinds) // 8)
            extra = (losses * answers).sum() / answers.sum().clamp_min(300)
            torch.autograd.backward((mean + 0.5 * extra) / halves)
        with torch.no_grad():
            text = kinds == TEXT
            self._sums += torch.stack(
                [(losses * text).sum(), text.sum(), (losses * answers).sum(), answers.sum()]
            )

    def _move(self, batch: Batch) -> _Moved:
        """Host arrays to device tensors, off the main stream; runs in the loader's thread."""
        tokens = torch.from_numpy(batch.tokens.astype(np.int32))
        kinds = torch.from_numpy(batch.kinds)
        if self._copies is None:
            return _Moved(batch, tokens.long(), kinds, None)
        with torch.cuda.stream(self._copies):
            tokens = tokens.pin_memory().to(self._device, non_blocking=True).long()
            kinds = kinds.pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._copies)
        return _Moved(batch, tokens, kinds, copied)

    # -- checks ----------------------------------------------------------------------------------

    def _lengths(self) -> tuple[int, ...]:
        longest = self._facts["longest"]
        lengths = [s.length for s in self._plan.stages if s.length < longest]
        return (*lengths, longest) if longest else ()

    def _report(self, seconds: float, tokens: int, waited: float) -> None:
        text, text_count, answer, answer_count = self._sums.tolist()
        self._sums.zero_()
        facts = self._facts
        line = {
            "step": facts["step"],
            "clock": round(facts["clock"], 1),
            "tokens": facts["tokens_seen"],
            "longest": facts["longest"],
            "text_loss": round(text / max(1, text_count), 4),
            "answer_loss": round(answer / max(1, answer_count), 4),
            "tokens_per_second": round(tokens / max(1e-9, seconds)),
            "waited_for_data": round(waited, 2),
            "text_epochs": round(facts["text_tokens_seen"] / self._data.tokens, 2),
        }
        if self._device.type == "cuda":
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        self._record(line)
        if not np.isfinite(text + answer):
            raise TrainingError(
                "The loss is not finite: start again with another seed or lower rates in the plan."
            )

    def _check(
        self,
        lengths: tuple[int, ...],
        *,
        tasks: tuple[str, ...] = TASKS,
        tokens: int = 262_144,
        final: bool = False,
    ) -> None:
        start = time.perf_counter()
        model, data = self._model, self._data
        scores = retrieval_scores(
            model, data.builder, lengths, tasks=tasks, tokens=4 * tokens if final else tokens
        )
        windows = {min(2048, lengths[-1])} | ({lengths[-1]} if final else set())
        bits = {
            str(n): round(
                bits_per_byte(model, data.validation, data.sizes, length=n, tokens=tokens), 4
            )
            for n in sorted(windows)
        }
        retrieval = [
            {"task": s.task, "length": s.length, "share": round(s.share, 4), "asked": s.asked}
            for s in scores
        ]
        found = {"retrieval": retrieval, "bits_per_byte": bits}
        self._record({"step": self._facts["step"], **found, "seconds": time.perf_counter() - start})
        if final:
            self._facts |= found

    def _record(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        tqdm.write(text)
        self._settings.state.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def _on_signal(self, *_: object) -> None:
        self._stop = True
