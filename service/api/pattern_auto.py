"""GET /v1/patterns/auto: the pattern that suits a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse

from kernels.errors import PatternError
from kernels.patterns.presets import auto
from service.errors import RequestError

if TYPE_CHECKING:
    from fastapi import Request

GRIDS = ("image", "video")
"""Tasks whose texts are grids."""


async def pattern_auto(request: Request) -> JSONResponse:
    """By `task`, `tokens`, `rows` and `cols` of a grid, and `causal`."""
    asked = request.query_params
    sides = [_number(asked[name], name) for name in ("rows", "cols") if name in asked]
    grid = (sides[0], sides[1]) if len(sides) == 2 else None
    tokens = _number(asked.get("tokens", "4096"), "tokens")
    causal = asked.get("causal", "true")
    if causal not in ("true", "false"):
        raise RequestError("causal: must be true or false", param="causal")
    task = asked.get("task", "")
    if grid is None and task in GRIDS:
        raise RequestError(f"rows: the task {task} needs rows and cols, of its grid", param="rows")
    try:
        pattern = auto(task, tokens, grid, causal=causal == "true")
    except PatternError as error:
        raise RequestError(str(error), param="task", code="invalid_pattern") from None
    return JSONResponse({"object": "pattern", "spec": str(pattern)})


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise RequestError(f"{name}: must be a number", param=name)
    return int(text)
