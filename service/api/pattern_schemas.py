"""What clients may send to the pattern endpoints."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LONGEST = 1 << 20
"""Tokens among which a pattern is looked at."""


class ViewRequest(BaseModel):
    """Body of POST /v1/patterns."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    spec: Annotated[str, Field(max_length=4096)]  # the parser points at what is too long
    length: Annotated[int, Field(strict=True, ge=1, le=LONGEST)]
    causal: Annotated[bool, Field(strict=True)] | None = None  # in place of what the spec says
    rows: tuple[int, int] | None = None  # first query, and one behind the last; all of them
    columns: tuple[int, int] | None = None  # likewise of the keys
    cells: Annotated[int, Field(strict=True, ge=8, le=256)] = 128  # of a side, at most
