"""From a sequence's new tokens to the text the caller sees, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.tokenizer import Detokenizer

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer
    from service.engine.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a choice ended, and on which stop string or token id."""

    reason: FinishReason
    matched: str | int | None = None


class Output:
    """Detokenises one sequence as it grows and watches for its end.

    Text that may turn out to begin a stop string is held back until it does or cannot.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt: tuple[int, ...],
        ends: frozenset[int],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, prompt)
        self._params = params
        self._ends = frozenset() if params.ignore_eos else ends
        self._held = ""

    def push(self, token: int, generated: int, room: bool) -> tuple[str, Ending | None]:
        """Take one sampled token.

        Args:
            token: its id.
            generated: tokens generated, this one included.
            room: whether the model's length allows one more.

        Returns:
            Text that may be shown now, and the ending if this token is the last.
        """
        params = self._params
        if generated > params.min_tokens:
            if token in self._ends:
                return self._held + self._detokenizer.finish(), Ending("stop")
            if token in params.stop_token_ids:
                return self._held + self._detokenizer.finish(), Ending("stop", token)
        self._held += self._detokenizer.push([token])
        last = generated >= params.max_tokens or not room
        if last:
            self._held += self._detokenizer.finish()
        match = self._stop_string() if generated > params.min_tokens else None
        if match is not None:
            place, stop = match
            end = place + (len(stop) if params.include_stop_str_in_output else 0)
            return self._held[:end], Ending("stop", stop)
        if last:
            return self._held, Ending("length")
        safe = len(self._held) - self._doubtful()
        text, self._held = self._held[:safe], self._held[safe:]
        return text, None

    def _stop_string(self) -> tuple[int, str] | None:
        """Where the first stop string begins in the held text, and which it is."""
        found = [
            (place, stop) for stop in self._params.stop if (place := self._held.find(stop)) >= 0
        ]
        return min(found, default=None)

    def _doubtful(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._params.stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if stop.startswith(self._held[-size:]):
                    longest = size
                    break
        return longest
