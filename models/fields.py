"""JSON files of a checkpoint, read with their types checked."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from models.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Fields:
    """One JSON object; every getter raises CheckpointError on a value of another type.

    A field that is null counts as absent, as in Hugging Face's files.
    """

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self.values = values
        self.source = source  # the file, as messages name it

    @staticmethod
    def read(file: Path) -> Fields:
        """The object in a JSON file.

        Raises:
            CheckpointError: when the file is missing or is not one JSON object.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}); "
                "give a folder that holds a Hugging Face checkpoint."
            ) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file} is not valid JSON ({error}); fetch the file again."
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} must hold a JSON object; fetch the file again.")
        return Fields(values, str(file))

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """The error for a field whose value is not what it should be."""
        value = self.values.get(name)
        if value is None:
            return CheckpointError(f"{self.source} lacks {name!r}; add {expected}.")
        return CheckpointError(f"{self.source}: {name!r} must be {expected}, not {value!r}.")

    def maybe_integer(self, name: str) -> int | None:
        """A positive integer, or None when absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(name, "a positive integer")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; an error when absent without a default."""
        value = self.maybe_integer(name)
        if value is None:
            value = default
        if value is None:
            raise self.wrong(name, "a positive integer")
        return value

    def maybe_number(self, name: str) -> float | None:
        """A finite number, or None when absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise self.wrong(name, "a finite number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0; an error when absent without a default."""
        value = self.maybe_number(name)
        if value is None:
            value = default
        if value is None or value <= 0:
            raise self.wrong(name, "a number above 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def maybe_text(self, name: str) -> str | None:
        """A string, or None when absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def maybe_texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Token ids: a number, a list of numbers, or absent."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids
        ):
            raise self.wrong(name, "a token id or a list of token ids")
        return tuple(ids)

    def maybe_object(self, name: str) -> Fields | None:
        """A JSON object, or None when absent or empty."""
        value = self.values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.source}: {name}")
