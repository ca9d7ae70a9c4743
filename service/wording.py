"""What the service says of a value that does not fit its field.

Pydantic's own sentences speak of Python: dictionaries, instances, validation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SENTENCES = {
    "missing": "this field is required",
    "extra_forbidden": "unknown field; remove it or correct its spelling",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have at most {max_length} entries",
}
"""By pydantic's kind of error; in braces is what its context has."""


def sentence(error: Mapping[str, Any]) -> str:
    """What is wrong, of one of `ValidationError.errors()`; a validator's own words as they are."""
    words = SENTENCES.get(error["type"])
    if words is None:
        return str(error["msg"]).removeprefix("Value error, ")
    return words.format(**{name: _shown(value) for name, value in error.get("ctx", {}).items()})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
