"""Named training plans: how long, on which lengths, with which shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.training.errors import TrainingError
from models.training.mix import Mix


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama dimensions."""

    vocab: int = 4096
    hidden: int = 384
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    intermediate: int = 1024
    rope_theta: float = 1e6
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Stage:
    """Part of a plan that trains up to one length."""

    length: int  # tokens
    until: float  # share of the plan's training time at which the stage ends


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run's result depends on, besides the text."""

    name: str
    minutes: float  # of training; start-up, evaluation and saving are not counted
    stages: tuple[Stage, ...]
    shape: Shape = field(default_factory=Shape)
    mix: Mix = field(default_factory=Mix)
    step_tokens: int = 65_536  # twice that in the second half
    shortest: int = 512  # tokens
    short_share: float = 0.33  # share of steps with a shorter length than the stage's
    warmup_steps: int = 100
    decay: float = 0.42  # share of the time at the end in which the rates fall to 2%
    muon_rate: float = 4e-3
    adam_rate: float = 3e-3
    text_epochs: float = 12.0  # passes over the text with loss on it: more overfits 60 MB of books
    filler_characters: int = 6_000_000
    tokenizer_characters: int = 30_000_000  # of text to train the tokenizer on
    # Of what the run changed in its start's weights so much is kept: between the two the model is
    # better than at either end (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
    blend: float = 1.0

    @property
    def seconds(self) -> float:
        """Training time."""
        return 60.0 * self.minutes

    def stage(self, progress: float) -> Stage:
        """The stage at a share of the training time."""
        return next((s for s in self.stages if progress < s.until), self.stages[-1])

    def lengths(self, stage: Stage) -> tuple[int, ...]:
        """Shorter lengths that the stage keeps, in doubling steps."""
        lengths = []
        length = self.shortest
        while length < stage.length:
            lengths.append(length)
            length *= 2
        return tuple(lengths)

    def rate(self, progress: float, step: int) -> float:
        """Factor on the learning rates: warm-up in steps, then constant, then linear to 2%."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = max(0.0, 1.0 - progress) / self.decay
        return warm * min(1.0, 0.02 + 0.98 * left)


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(
            name="tiny",
            minutes=0.05,
            stages=(Stage(256, 0.2), Stage(512, 1.0)),
            shape=Shape(512, 64, 2, 4, 2, 16, 128),
            step_tokens=2048,
            shortest=128,
            warmup_steps=5,
            filler_characters=60_000,
            tokenizer_characters=200_000,
        ),
        Plan(
            name="quick",
            minutes=5.0,
            stages=(Stage(2048, 0.17), Stage(8192, 0.5), Stage(16_384, 1.0)),
        ),
        Plan(
            name="full",
            minutes=7.8,
            stages=(
                Stage(2048, 0.13),
                Stage(8192, 0.38),
                Stage(16_384, 0.60),
                Stage(32_768, 1.0),
            ),
        ),
        Plan(
            name="long",
            minutes=14.5,
            stages=(
                Stage(2048, 0.09),
                Stage(8192, 0.27),
                Stage(16_384, 0.42),
                Stage(32_768, 0.68),
                Stage(65_536, 1.0),
            ),
        ),
        # From the checkpoint of `long` (--start): more kinds of questions, most of them at length.
        Plan(
            name="answers",
            minutes=7.1,
            stages=(
                Stage(4096, 0.08),
                Stage(8192, 0.18),
                Stage(16_384, 0.32),
                Stage(32_768, 0.56),
                Stage(65_536, 1.0),
            ),
            short_share=0.4,
            shortest=1024,
            warmup_steps=50,
            decay=0.6,
            muon_rate=2.5e-3,
            adam_rate=1.5e-3,
            text_epochs=2.0,
        ),
        # From the checkpoint of `answers`: the same questions at lower rates.
        Plan(
            name="finish",
            minutes=4.0,
            stages=(Stage(4096, 0.08), Stage(16_384, 0.26), Stage(65_536, 1.0)),
            short_share=0.45,
            shortest=1024,
            warmup_steps=50,
            decay=0.75,
            muon_rate=1.8e-3,
            adam_rate=1e-3,
            text_epochs=0.8,
        ),
        # From the checkpoint of `finish`: what it still got wrong, on one GPU. Which of a key's
        # values comes next is learnt on short documents, where a second holds ten times as many.
        Plan(
            name="values",
            minutes=7.4,
            stages=(Stage(4096, 0.22), Stage(16_384, 0.42), Stage(65_536, 1.0)),
            mix=Mix(
                plain=0.16,
                needles=0.34,
                key_value=0.22,
                several=0.12,
                majority=0.08,
                four_values=0.7,
            ),
            short_share=0.4,
            shortest=1024,
            warmup_steps=50,
            decay=0.7,
            muon_rate=2e-3,
            adam_rate=1e-3,
            text_epochs=1.0,
            blend=0.35,
        ),
        # From the checkpoint of `values`: low rates, all lengths together.
        Plan(
            name="polish",
            minutes=4.2,
            stages=(Stage(65_536, 1.0),),
            mix=Mix(
                plain=0.12,
                needles=0.36,
                key_value=0.24,
                several=0.12,
                majority=0.06,
                four_values=0.75,
            ),
            short_share=0.6,
            shortest=1024,
            warmup_steps=30,
            decay=1.0,
            muon_rate=6e-4,
            adam_rate=3e-4,
            text_epochs=0.7,
        ),
    )
}


def find_plan(name: str) -> Plan:
    """The plan of a name.

    Raises:
        TrainingError: there is no such plan.
    """
    if name not in PLANS:
        raise TrainingError(f"There is no plan {name!r}: choose one of {', '.join(PLANS)}.")
    return PLANS[name]
