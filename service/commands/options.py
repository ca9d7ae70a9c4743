"""Command-line options made from the configuration's fields, so that there is one list of them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import BaseModel

from service.config import ServiceConfig

if TYPE_CHECKING:
    from collections.abc import Callable

SEPARATOR = "__"
"""Between a group and its field in the names of parameters, as in environment variables."""


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, which takes `**flags`, an option for every field but `model`.

    Values arrive as text, or None where not given: the configuration checks and converts them.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    kept = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = _options(ServiceConfig, "", "Service")
    command.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
    return command


def as_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """What was given, in the configuration's groups."""
    fields: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None:
            continue
        group, _, field = name.rpartition(SEPARATOR)
        (fields.setdefault(group, {}) if group else fields)[field] = value
    return fields


def _options(model: type[BaseModel], prefix: str, panel: str) -> list[inspect.Parameter]:
    options = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            options += _options(kind, name + SEPARATOR, name.capitalize())
        elif name != "model":
            flag = f"--{(prefix + name).replace(SEPARATOR, '-').replace('_', '-')}"
            shown = "" if field.default is None else f" (default: {field.default})"
            about = field.description or ", ".join(map(str, get_args(kind)))
            option = typer.Option(
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                help=about + shown,
                rich_help_panel=panel,
                metavar=None if kind is bool else "VALUE",
            )
            options.append(
                inspect.Parameter(
                    prefix + name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[(bool if kind is bool else str) | None, option],
                )
            )
    return options
