"""What one sequence's attention did, summed over its tail and generated tokens."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from service.engine.types import PrefillReport, SparsityReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from service.engine.sequence import Fallback
    from service.engine.types import SparsityParams


@dataclass(frozen=True, slots=True)
class Looked:
    """What consecutive tokens of one sequence looked at."""

    density: NDArray[np.float64]  # [layers, tokens]  keys attended over keys visible
    keys: NDArray[np.float64]  # [layers, tokens]  mean over KV heads
    coverage: NDArray[np.float64]  # [layers, tokens, heads]  estimated; 1 where dense
    exact: NDArray[np.float64] | None = None  # [layers, tokens, heads]  in an audited step

    def cut(self, part: slice) -> Looked:
        """The tokens of `part`."""
        exact = None if self.exact is None else self.exact[:, part]
        return Looked(self.density[:, part], self.keys[:, part], self.coverage[:, part], exact)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What consecutive tokens of a prompt, before its tail, looked at, page by page of queries."""

    tokens: NDArray[np.int64]  # [pages]  how many of a page's
    density: NDArray[np.float64]  # [pages]  keys read over keys visible, mean over layers
    coverage: NDArray[np.float64]  # [pages]  mean over layers and heads; 1: dense, nan: unknown

    def behind(self, count: int) -> Prefilled:
        """The same without the first `count` tokens."""
        left = (self.tokens.cumsum() - count).clip(0, self.tokens)
        some = left > 0
        return Prefilled(left[some], self.density[some], self.coverage[some])

    @property
    def mean_density(self) -> float:
        """Mean over the tokens."""
        return float(np.average(self.density, weights=self.tokens))

    @property
    def mean_coverage(self) -> float | None:
        """The same; None: unknown."""
        mean = float(np.average(self.coverage, weights=self.tokens))
        return None if np.isnan(mean) else mean


@dataclass(slots=True)
class Tally:
    """Running sums; `report` turns them into what an answer carries."""

    rows: int = 0
    density: float = 0.0
    keys: float = 0.0
    coverage: NDArray[np.float64] | None = None  # [layers, heads], summed over rows
    fallbacks: Counter[str] = field(default_factory=Counter)
    # Of a prompt before its tail, computed once: its tokens, and sums over them.
    prefilled: int = 0
    prefill_density: float = 0.0
    prefill_coverage: float = 0.0  # nan: unknown

    def add(self, looked: Looked) -> None:
        """Count more tokens."""
        self.rows += looked.density.shape[1]
        self.density += float(looked.density.mean(0).sum())
        self.keys += float(looked.keys.mean(0).sum())
        coverage = looked.coverage.sum(1)
        self.coverage = coverage if self.coverage is None else self.coverage + coverage

    def add_prefill(self, prefilled: Prefilled) -> None:
        """Count more tokens of the prompt before its tail."""
        self.prefilled += int(prefilled.tokens.sum())
        self.prefill_density += float(prefilled.density @ prefilled.tokens)
        self.prefill_coverage += float(prefilled.coverage @ prefilled.tokens)

    def fell_back(self, reason: Fallback, tokens: int = 1) -> None:
        """Count tokens that left the dynamic policy."""
        self.fallbacks[reason.value] += tokens

    def shared(self) -> Tally:
        """For another choice on the same prompt: it looked there too; its tokens count once."""
        return replace(deepcopy(self), fallbacks=Counter())

    def report(self, sparsity: SparsityParams) -> SparsityReport:
        """Means over everything counted; coverage's 5th percentile is over layers and heads."""
        rows = max(self.rows, 1)
        mean = None if self.coverage is None else self.coverage / rows  # [layers, heads]
        return SparsityReport(
            policy=sparsity.policy,
            density=self.density / rows,
            coverage=None if mean is None else float(mean.mean()),
            coverage_p5=None if mean is None else float(np.percentile(mean, 5)),
            keys_attended=self.keys / rows,
            fallbacks=dict(self.fallbacks),
            prefill=self._prefill_report(sparsity.prefill),
        )

    def _prefill_report(self, policy: str) -> PrefillReport | None:
        if self.prefilled == 0:
            return None
        coverage = self.prefill_coverage / self.prefilled
        return PrefillReport(
            policy=policy,
            density=self.prefill_density / self.prefilled,
            coverage=None if np.isnan(coverage) else coverage,
        )
