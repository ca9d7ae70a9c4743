"""What became of one request, as the client saw it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Outcome:
    """One request; times are seconds since the start of the run.

    Attributes:
        due: when it should have been sent; in a closed loop, when it was.
        sent: when it was sent. What a late client adds to `due` counts as the server's: a user
            who should have been served by then waited, too (Tene, "coordinated omission").
        tokens_at: arrival of every event that carries tokens.
        ended: end of the answer, or of the failure.
        prompt_tokens, output_tokens: by the server's usage; without one, as planned and one an
            event.
        error: None, or its kind: "http 503", "connection", "timeout", "stream error", "truncated".
        detail: what the server or the connection said of the error.
        sparsity: Saccade's report, where there is one.
    """

    due: float
    sent: float
    prompt_tokens: int
    output_tokens: int = 0
    tokens_at: list[float] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None
    detail: str = ""
    sparsity: dict[str, Any] | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from when it was due to its first token."""
        return self.tokens_at[0] - self.due if self.tokens_at else None

    @property
    def e2e(self) -> float | None:
        """Seconds from when it was due to its last token."""
        return self.tokens_at[-1] - self.due if self.tokens_at else None

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds between one event with tokens and the next."""
        return [late - early for early, late in itertools.pairwise(self.tokens_at)]

    @property
    def tpot(self) -> float | None:
        """Seconds a token behind the first, as usage counts them."""
        if len(self.tokens_at) < 2 or self.output_tokens < 2:
            return None
        return (self.tokens_at[-1] - self.tokens_at[0]) / (self.output_tokens - 1)
