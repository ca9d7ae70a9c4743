"""Every text of the sources, and every error that they raise, read from the syntax trees."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLE = "…"
"""Stands for what a message fills in."""


@dataclass(frozen=True)
class Raised:
    """A `raise` of one of the errors in `names`."""

    error: str
    message: str
    code: str | None
    file: str


@cache
def texts():
    """Every string of service, models and kernels; what is filled in is an ellipsis."""
    return tuple(
        dict.fromkeys(
            text
            for _, tree in _trees("service", "models", "kernels")
            for node in ast.walk(tree)
            if (text := text_of(node)) is not None
        )
    )


def raised(names, *folders):
    """Every `raise Error(message, ...)` in the folders whose message is written there."""
    found = []
    for file, tree in _trees(*folders):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id not in names or not node.args:
                continue
            message = text_of(node.args[0])
            if message is None or not message.strip(HOLE + " :"):
                continue
            codes = [one.value for one in node.keywords if one.arg == "code"]
            code = codes[0].value if codes and isinstance(codes[0], ast.Constant) else None
            found.append(Raised(node.func.id, message, code, file))
    return found


def text_of(node):
    """A string's text with a hole for each value; None where the node is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else HOLE for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [text_of(node.left), text_of(node.right)]
        return None if sides == [None, None] else "".join(HOLE if s is None else s for s in sides)
    return None


@cache
def _trees(*folders):
    return tuple(
        (str(file.relative_to(ROOT)), ast.parse(file.read_text()))
        for folder in folders
        for file in _files(ROOT / folder)
    )


def _files(path):
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]
