"""What became of one piece of work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from service.engine.explained import Explained
    from service.engine.scheduler import Work
    from service.engine.tally import Looked, Prefilled


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one piece of work."""

    work: Work
    # [count, hidden] behind the final norm; None when it failed, or when a graph was replayed.
    hidden: Tensor | None
    looked: Looked | None
    error: str | None = None
    prefilled: Prefilled | None = None  # of its tokens before the prompt's tail, if any
    # Of a replayed row, on the host.
    logits: Tensor | None = None  # float32 [vocab]
    finite: bool | None = None  # whether the hidden state is
    explained: Explained | None = None  # what its last token attended to, where asked for


def checked(outcomes: Seq[Outcome]) -> list[Outcome]:
    """The outcomes, with an error in the place of those that cannot be sampled from."""
    ends = [one.hidden[-1] for one in outcomes if one.work.samples and one.hidden is not None]
    # One question to the device for all of them.
    sound = iter(torch.isfinite(torch.stack(ends)).all(-1).tolist() if ends else ())
    found: list[Outcome] = []
    for outcome in outcomes:
        seen = outcome.looked
        assert seen is not None
        finite = outcome.finite
        if outcome.work.samples and not (next(sound) if finite is None else finite):
            error = "the model's output for this is not finite"
            found.append(Outcome(outcome.work, None, None, error))
            continue
        # A fixed pattern's coverage is informative only: where it is not judged or its scores
        # overflow, nothing is known to be covered, and an audit has nothing to compare.
        exact = np.zeros(0) if seen.exact is None else seen.exact
        if not (np.isfinite(seen.coverage).all() and np.isfinite(exact).all()):
            known = np.nan_to_num(seen.coverage, nan=0.0, posinf=0.0)
            seen = replace(seen, coverage=known, exact=None)
        found.append(replace(outcome, looked=seen))
    return found
