"""One sequence of an evaluation under one policy, and what its attention did."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from service.engine.holds import decide
from service.engine.sequence import Mode
from service.engine.tally import Looked, Tally
from service.errors import GenerationError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from service.engine.outcome import Outcome
    from service.engine.sequence import Fallback, Sequence
    from service.engine.types import SparsityReport


@dataclass(frozen=True, slots=True)
class Audit:
    """Exact and estimated coverage of the audited tokens that attended sparsely."""

    exact: NDArray[np.float64]  # [layers, audited, heads]
    estimated: NDArray[np.float64]  # [layers, audited, heads]


@dataclass(slots=True, eq=False)
class Script:
    """A sequence, and notes of its steps; they are added up once, at the end."""

    sequence: Sequence
    prefilled: Tally = field(default_factory=Tally)  # of the prompt before its tail
    _looked: list[Looked] = field(default_factory=list)
    _exact: list[NDArray[np.float64]] = field(default_factory=list)
    _estimated: list[NDArray[np.float64]] = field(default_factory=list)
    _fallbacks: Counter[str] = field(default_factory=Counter)

    def book(self, outcome: Outcome) -> Tensor:
        """Note a step; its hidden states, [count, hidden].

        Raises:
            GenerationError: the model failed.
        """
        item, looked = outcome.work, outcome.looked
        if outcome.error is not None or outcome.hidden is None or looked is None:
            raise GenerationError(outcome.error or "the model failed on this prompt")
        skip = decide(item, self._fell_back)
        if skip < item.count:
            self._looked.append(looked.cut(slice(skip, None)) if skip else looked)
        if looked.exact is not None:
            # What fell back to dense attention has nothing to estimate.
            rows = [
                row
                for row in range(skip, item.count)
                if self.sequence.mode(item.start + row) is not Mode.DENSE
            ]
            self._exact.append(looked.exact[:, rows])
            self._estimated.append(looked.coverage[:, rows])
        self.sequence.computed = item.stop
        return outcome.hidden

    def report(self) -> SparsityReport:
        """What the answer would carry."""
        tally = deepcopy(self.prefilled)
        tally.fallbacks += self._fallbacks
        if self._looked:
            density, keys, coverage = (
                np.concatenate([getattr(one, name) for one in self._looked], axis=1)
                for name in ("density", "keys", "coverage")
            )
            tally.add(Looked(density, keys, coverage))
        return tally.report(self.sequence.request.sparsity)

    def audit(self, layers: int, heads: int) -> Audit:
        """The audited tokens of a model with so many layers and heads."""
        none = np.empty((layers, 0, heads))
        return Audit(
            np.concatenate([none, *self._exact], axis=1),
            np.concatenate([none, *self._estimated], axis=1),
        )

    def _fell_back(self, reason: Fallback, _: Mode, tokens: int) -> None:
        self._fallbacks[reason.value] += tokens
