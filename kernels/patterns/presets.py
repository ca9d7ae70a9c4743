"""Presets: the patterns of published models, which of them a pattern is, and which suits a task."""

from __future__ import annotations

from dataclasses import replace

from kernels.errors import PatternError
from kernels.patterns.expression import Union
from kernels.patterns.pattern import Pattern
from kernels.patterns.primitive import Primitive
from kernels.patterns.published import SPECS

VERY_LONG = 1 << 16
"""Tokens from which on random blocks are worth their keys: a window's reach grows too slowly."""
TASKS = ("classification", "generation", "image", "video", "document", "structured")


def preset(name: str) -> Pattern:
    """A preset by its name; `Pattern.parse` reads names, too.

    Raises:
        PatternError: there is none of that name.
    """
    if name not in SPECS:
        raise PatternError(f"there is no preset {name[:40]!r}: write one of {', '.join(SPECS)}")
    return Pattern.parse(name)


def recognise(pattern: Pattern) -> str | None:
    """The preset whose primitives a union holds, whatever their numbers; None for no such model.

    A gap in Longformer's window does not change its name, nor does a causal form of it or of
    BigBird. The others are causal or nothing.
    """
    if isinstance(pattern.expression, Union):
        parts = pattern.expression.parts
    else:
        parts = (pattern.expression,)
    if not all(isinstance(part, Primitive) for part in parts):
        return None
    names = {part.name for part in pattern.primitives}
    if "global" in names and "dilated" in names:
        names = names - {"dilated"} | {"window"}
    for name in SPECS:
        model = Pattern.parse(name)
        if names == {part.name for part in model.primitives} and pattern.causal >= model.causal:
            return name
    return None


def auto(
    task: str, tokens: int, grid: tuple[int, int] | None = None, *, causal: bool = True
) -> Pattern:
    """The pattern that suits a task. A causal one shows every query the key before it.

    Rows or columns for images, and for a video the same place of other frames, too; fixed blocks
    for structured data; for other tasks BigBird where there are very many tokens, else a window to
    generate, and Longformer to classify and for documents.

    Args:
        task: one of `TASKS`.
        tokens: how many there are at most.
        grid: rows and columns of an image or of a video's frame.
        causal: whether a token sees nothing behind itself.

    Raises:
        PatternError: the task is unknown, or a grid is missing or too large.
    """
    if task not in TASKS:
        raise PatternError(f"there is no task {task[:40]!r}: write one of {', '.join(TASKS)}")
    if task in ("image", "video"):
        if grid is None:
            raise PatternError(f"the task {task} needs a grid: write [rows, columns] of an image")
        spec = _of_grid(*grid, frames=task == "video", causal=causal)
    elif task == "structured":
        spec = SPECS["sparse-transformer-fixed"]
    elif tokens >= VERY_LONG:
        spec = SPECS["bigbird"]
    else:
        spec = SPECS["mistral" if task == "generation" else "longformer"]
    return replace(Pattern.parse(spec), causal=causal)


def _of_grid(rows: int, cols: int, *, frames: bool, causal: bool) -> str:
    spec = f"axial:{rows},{cols}"
    if frames:
        spec += f"+strided:{rows * cols}"  # the same place of every frame
    # The last pixel of a row is in neither the row nor the column of the one behind it.
    return f"{spec}+window:2" if causal else spec
