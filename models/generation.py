"""Sampling values that a checkpoint proposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling values that generation_config.json proposes; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @staticmethod
    def parse(fields: Fields) -> GenerationDefaults:
        """Read generation_config.json.

        Raises:
            CheckpointError: when a value is of a wrong type.
        """
        temperature = fields.maybe_number("temperature")
        if not fields.flag("do_sample", True):
            # The other values then only say what sampling would use: the likeliest token is meant.
            temperature = 0.0
        top_k = fields.maybe_number("top_k")
        return GenerationDefaults(
            temperature=temperature,
            top_p=fields.maybe_number("top_p"),
            top_k=None if top_k is None else int(top_k),
            min_p=fields.maybe_number("min_p"),
            repetition_penalty=fields.maybe_number("repetition_penalty"),
        )
