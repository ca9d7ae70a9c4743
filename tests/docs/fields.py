"""What a JSON schema says of a field, in words."""

from __future__ import annotations

import json

from tests.docs.markdown import code

_PLURAL = {
    "integer": "integers",
    "number": "numbers",
    "string": "strings",
    "boolean": "booleans",
    "object": "objects",
    "array": "lists",
}


def kind_of(one, schema):
    """Type and limits of a field; empty where the schema leaves it open."""
    if "anyOf" in one:
        kinds = [kind_of(each, schema) for each in one["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in one:
        return kind_of(schema["$defs"][one["$ref"].rsplit("/", 1)[1]], schema)
    if "enum" in one:
        return ", ".join(code(json.dumps(value)) for value in one["enum"])
    if "const" in one:
        return code(json.dumps(one["const"]))
    kind = one.get("type", "")
    if one.get("format") == "path":
        kind = "path"
    if kind == "array" and "prefixItems" in one:
        return f"list of {len(one['prefixItems'])} {_PLURAL[one['prefixItems'][0]['type']]}"
    if kind == "array":
        inner = one.get("items", {})
        inner = schema["$defs"][inner["$ref"].rsplit("/", 1)[1]] if "$ref" in inner else inner
        kind = f"list of {_PLURAL[inner['type']]}" if "type" in inner else "list"
        return kind + _limits(one, "minItems", "maxItems", " entries")
    if kind == "object" and "additionalProperties" in one:
        more = one["additionalProperties"]
        return f"object of {_PLURAL[more['type']]}" if isinstance(more, dict) else kind
    if kind in ("integer", "number"):
        return kind + _range(one, kind == "integer")
    if kind == "string":
        return kind + _limits(one, "minLength", "maxLength", " characters")
    return kind


def shown_default(value):
    """A default as it is written in JSON."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return code(json.dumps(value))


def _range(one, whole):
    low = _number(one["minimum"]) if "minimum" in one else None
    if "exclusiveMinimum" in one:
        low = f"over {_number(one['exclusiveMinimum'])}"
    high = one.get("maximum")
    if "exclusiveMaximum" in one:
        high = one["exclusiveMaximum"] - 1 if whole else f"below {one['exclusiveMaximum']}"
    if low is not None and high is not None:
        return f", {low} to {_number(high)}"
    if low is not None:
        return f", {low}" if low.startswith("over") else f", at least {low}"
    return "" if high is None else f", at most {_number(high)}"


def _number(value):
    if isinstance(value, str):
        return value
    for power in (31, 63):
        if value == 2**power - 1:
            return f"2^{power} - 1"
        if abs(value) == 2**power:
            return f"{'-' if value < 0 else ''}2^{power}"
    return str(value) if isinstance(value, int) else f"{value:g}"


def _limits(one, least, most, what):
    low, high = one.get(least), one.get(most)
    if low is None and high is None:
        return ""
    if high is None:
        return ", not empty" if low == 1 else f", at least {low}{what}"
    return f", {low} to {high}{what}" if low else f", at most {high}{what}"
