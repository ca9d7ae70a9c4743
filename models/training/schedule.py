"""Which batches a run takes: their lengths, and how much of their running text carries loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from models.training.batches import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.training.batches import Batch, Loader
    from models.training.plans import Plan
    from models.training.ranks import Ranks

_AHEAD = 24  # batches asked for before they are needed


class Schedule:
    """Asks for batches and counts those taken, in the run's `facts`.

    Of every `world` batches in a row each rank takes its own; all of them have the same length, so
    that no rank waits for another's longer one.
    """

    def __init__(
        self, plan: Plan, facts: dict[str, Any], *, text_tokens: int, ranks: Ranks
    ) -> None:
        self._plan, self._facts, self._ranks = plan, facts, ranks
        self._text_tokens = text_tokens  # of the text; a pass has so many
        self._asked: int = facts["batch"]
        self._taken = np.zeros(4)  # by this rank: see `taken`

    def ask(self, loader: Loader, progress: float) -> None:
        """Keeps the workers busy; the same calls on all ranks ask for batches of one length."""
        plan = self._plan
        while loader.outstanding < _AHEAD:
            stage = plan.stage(progress)
            rng = np.random.default_rng([self._facts["seed"], 7, self._asked])
            length, shorter = stage.length, plan.lengths(stage)
            if shorter and rng.random() < plan.short_share:
                length = shorter[rng.integers(len(shorter))]
            share = self._text_loss_share(progress)
            index = self._asked + self._ranks.rank
            loader.submit(Request(index, plan.step_tokens // length, length, share))
            self._asked += self._ranks.world

    def count(self, batch: Batch) -> None:
        """Counts a batch that this rank takes, and with it those of the other ranks."""
        facts, request, world = self._facts, batch.request, self._ranks.world
        facts["batch"] = request.index - self._ranks.rank + world
        facts["tokens_seen"] += world * request.rows * request.length
        facts["longest"] = max(facts["longest"], request.length)
        share = batch.text_share
        possible = batch.text_tokens / share if share else 0.0
        self._taken += [batch.text_tokens, possible, float(share > 0), 1.0]

    def taken(self) -> list[float]:
        """What ranks cannot know of each other, since the last call.

        Text tokens with loss, those that could have carried it, batches that tell, batches.
        """
        taken: list[float] = self._taken.tolist()
        self._taken[:] = 0.0
        return taken

    def settle(self, totals: Sequence[float]) -> None:
        """Takes in the sums over all ranks of what `taken` gave."""
        facts = self._facts
        tokens, possible, telling, batches = totals
        facts["text_tokens_seen"] += int(tokens)
        facts["rate_text"] += possible
        facts["rate_batches"] += int(telling)
        facts["rate_all"] += int(batches)
        elapsed = facts["clock"] - facts["rate_clock"]
        if elapsed > 0.01 * self._plan.seconds and facts["rate_batches"]:
            per_batch = facts["rate_text"] / facts["rate_batches"]
            facts |= {
                "text_rate": per_batch * facts["rate_all"] / elapsed,
                "rate_clock": facts["clock"],
                "rate_text": 0.0,
                "rate_batches": 0,
                "rate_all": 0,
            }

    def _text_loss_share(self, progress: float) -> float:
        """Share of sequences with loss on text, so that the text's passes spread over the clock.

        A tenth of the passes comes early, when the model learns the language at all.
        """
        plan, facts = self._plan, self._facts
        budget = plan.text_epochs * self._text_tokens
        if not facts["text_rate"]:
            return 0.5
        due = budget * (0.1 * min(1.0, progress / 0.03) + 0.9 * progress)
        horizon = 0.02 * plan.seconds
        wanted = (due - facts["text_tokens_seen"]) / horizon + 0.9 * budget / plan.seconds
        return float(min(1.0, max(0.02, wanted / facts["text_rate"])))
