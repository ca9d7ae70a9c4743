"""What the pattern endpoints answer: the catalogue of primitives, and a pattern looked at."""

from __future__ import annotations

import inspect
from base64 import b64encode
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.page import PAGE
from kernels.patterns import complexity
from kernels.patterns.expression import Compound, Union
from kernels.patterns.parse import DEPTH, LENGTH, MOST, PRIMITIVES
from kernels.patterns.pattern import Pattern
from kernels.patterns.picture import picture
from kernels.patterns.presets import TASKS, VERY_LONG, preset, recognise
from kernels.patterns.primitive import LARGEST, Primitive
from kernels.patterns.published import SPECS
from service.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.patterns.expression import Expression
    from service.api.pattern_schemas import ViewRequest

EXACT = 1024
"""Tokens up to which the keys of each single query are counted, and not those of 64 together."""
MOST_SHOWN = 1 << 14
"""Tokens that are drawn whole, at most."""
POINTS = 256
"""Points of the keys a query, at most."""


@cache
def catalogue() -> dict[str, Any]:
    """Primitives with their numbers, presets, tasks, and the limits of a pattern."""
    return {
        "object": "patterns",
        "primitives": [_primitive(kind) for kind in PRIMITIVES],
        "operators": [
            {"symbol": "+", "name": "union", "description": "What either pattern allows."},
            {
                "symbol": "&",
                "name": "intersection",
                "description": "What both patterns allow; it binds tighter than a union.",
            },
            {
                "symbol": "@bidirectional",
                "name": "bidirectional",
                "description": "At the end: queries also see keys behind them.",
            },
        ],
        "presets": [_preset(name) for name in SPECS],
        "tasks": list(TASKS),
        "very_long": VERY_LONG,
        "limits": {"characters": LENGTH, "primitives": MOST, "parentheses": DEPTH},
    }


def _primitive(kind: type[Primitive]) -> dict[str, Any]:
    letters = kind.form.partition(":")[2].split(",")
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return {
        "name": kind.name,
        "form": kind.form,
        "description": " ".join(paragraphs[0].split()),
        "details": " ".join(" ".join(paragraphs[1:]).partition("Raises:")[0].split()),
        "growth": kind.growth,
        "example": str(kind(*kind.example)),
        "parameters": [
            {
                "name": field.name,
                "letter": letter,
                "least": kind.least(field.name),
                "most": LARGEST,
                "example": value,
            }
            for field, letter, value in zip(fields(kind), letters, kind.example, strict=False)
        ],
    }


def _preset(name: str) -> dict[str, Any]:
    pattern = preset(name)
    return {
        "name": name,
        "spec": SPECS[name],
        "causal": pattern.causal,
        "complexity": pattern.complexity,
        "length": _shown_by(pattern),
        "primitives": [_leaf(primitive) for primitive in pattern.primitives],
    }


def _shown_by(pattern: Pattern) -> int:
    """The fewest tokens, a power of two, of whose pairs a pattern leaves out most."""
    length = 2 * PAGE
    while pattern.sparsity(length) < 0.75 and length < MOST_SHOWN:
        length *= 2
    return length


def _leaf(primitive: Primitive) -> dict[str, Any]:
    return {"name": primitive.name, "spec": str(primitive), "numbers": list(astuple(primitive))}


def _terms(expression: Expression) -> list[dict[str, Any]] | None:
    """The primitives from left to right, each with the operator before it; None for parentheses."""
    if isinstance(expression, Primitive):
        return [{"operator": "", **_leaf(expression)}]
    assert isinstance(expression, Compound)
    operator = "+" if isinstance(expression, Union) else "&"
    found: list[dict[str, Any]] = []
    for part in expression.parts:
        inner = None if operator == "&" and isinstance(part, Union) else _terms(part)
        if inner is None:
            return None
        inner[0]["operator"] = operator if found else ""
        found += inner
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of a mask that is drawn: where its rows and columns begin and end."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    step: int

    @staticmethod
    def of(asked: ViewRequest) -> _Part:
        """The part asked for, in whole cells.

        Raises:
            RequestError: it lies outside, or has too many cells of 64 tokens.
        """
        rows = _range(asked.rows, asked.length, "rows")
        columns = _range(asked.columns, asked.length, "columns")
        longest = max(rows[1] - rows[0], columns[1] - columns[0])
        if longest > asked.cells * PAGE:
            raise RequestError(
                f"rows: {longest} tokens are more than {asked.cells} cells of at most {PAGE} "
                "tokens show; name a smaller part by rows and columns, or more cells",
                param="rows",
            )
        step = 1
        while step * asked.cells < longest:
            step *= 2
        return _Part(_whole(rows, step), _whole(columns, step), step)


def _range(asked: tuple[int, int] | None, length: int, name: str) -> tuple[int, int]:
    begin, end = asked or (0, length)
    if not 0 <= begin < end <= length:
        raise RequestError(
            f"{name}: must be [first, one behind the last] within 0 to {length}", param=name
        )
    return begin, end


def _whole(part: tuple[int, int], step: int) -> tuple[int, int]:
    return part[0] // step * step, -(-part[1] // step) * step


def view(asked: ViewRequest) -> dict[str, Any]:
    """A pattern among so many tokens: a part of its mask, and its figures.

    Raises:
        RequestError: the part lies outside.
        PatternError: the pattern does not parse, or is too much to count.
    """
    pattern = Pattern.parse(asked.spec)
    if asked.causal is not None:
        pattern = replace(pattern, causal=asked.causal)
    length, part = asked.length, _Part.of(asked)
    drawn = picture(pattern, part.rows, part.columns, length, part.step)
    each, step = _keys(pattern, length)
    pairs = int(each.sum())
    visible = length * (length + 1) // 2 if pattern.causal else length * length
    means = _means(each, length, step)
    figures = {
        "pairs": pairs,
        "visible": visible,
        "density": pairs / visible,
        "sparsity": 1 - pairs / visible,
        "keys_mean": pairs / length,
        "keys_most": max(means["values"]),
    }
    model = recognise(pattern)
    return {
        "object": "pattern.view",
        "spec": str(pattern),
        "causal": pattern.causal,
        "length": length,
        "primitives": [_leaf(primitive) for primitive in pattern.primitives],
        "terms": _terms(pattern.expression),
        "complexity": pattern.complexity,
        "formula": complexity.formula(pattern.expression),
        "recognised": model,
        "keeps_previous": pattern.keeps_previous,
        **figures,
        "keys_per_query": means,
        "mask": {
            "rows": list(part.rows),
            "columns": list(part.columns),
            "step": part.step,
            "shape": list(drawn.primitive.shape),
            "primitive": _encoded((drawn.primitive + 1).numpy().astype("<u1")),
            "share": _encoded((drawn.share * 255).ceil().numpy().astype("<u1")),
            "lit": _encoded(drawn.lit.numpy().astype("<u2")),
        },
        "summary": _summary(pattern, length, model, figures),
    }


def _keys(pattern: Pattern, length: int) -> tuple[Tensor, int]:
    """Keys of so many queries together, int64 [groups], and how many these are."""
    if length <= EXACT:
        return pattern.mask(length, length).sum(1), 1
    return pattern.keys_of_tiles(length), PAGE


def _means(each: Tensor, length: int, step: int) -> dict[str, Any]:
    """Keys a query, mean over groups of consecutive queries."""
    together = -(-len(each) // POINTS)
    sums = np.add.reduceat(each.numpy(), np.arange(0, len(each), together))
    step *= together
    starts = np.arange(len(sums)) * step
    queries = np.minimum(starts + step, length) - starts
    return {"step": step, "values": (sums / queries).round(2).tolist()}


def _encoded(cells: np.ndarray[Any, Any]) -> str:
    return b64encode(cells.tobytes()).decode()


def _summary(pattern: Pattern, length: int, model: str | None, figures: dict[str, float]) -> str:
    """The mask in words."""
    kind = "Causal" if pattern.causal else "Bidirectional"
    named = f", recognised as {model}" if model else ""
    kept = "keeps" if pattern.keeps_previous else "does not always keep"
    return (
        f"{kind} mask of {length:,} tokens, {pattern}{named}: a query sees "
        f"{figures['keys_mean']:,.1f} keys on average and {figures['keys_most']:,.1f} at the most; "
        f"{figures['sparsity']:.1%} of the pairs are left out; the work grows as "
        f"{pattern.complexity}; it {kept} the key before each query."
    )
