"""The tables of docs/configuration.md: every field of the configuration, as the code has it."""

from __future__ import annotations

import inspect

from pydantic import BaseModel

from service.config import BUNDLED_CHECKPOINT, ENV_PREFIX, ServiceConfig
from tests.docs.fields import kind_of, shown_default
from tests.docs.markdown import code, table

NAMES = ("field", "flag", "variable", "type", "default", "meaning")
ROOT = BUNDLED_CHECKPOINT.parents[2]


def fields():
    """A table for the fields at the top and one for each group."""
    schema = ServiceConfig.model_json_schema()
    groups = {
        name: field.annotation
        for name, field in ServiceConfig.model_fields.items()
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
    }
    own = {name: one for name, one in schema["properties"].items() if name not in groups}
    parts = [table(NAMES, _rows(ServiceConfig, own, schema, ""))]
    for name, model in groups.items():
        about = inspect.cleandoc(model.__doc__ or "")
        described = model.model_json_schema()
        rows = _rows(model, described["properties"], described, name)
        parts.append(f"### `{name}`\n\n{about}\n\n{table(NAMES, rows)}")
    return "\n\n".join(parts)


def _rows(model, properties, schema, group):
    for name, one in properties.items():
        path = [group, name] if group else [name]
        flag = "--" + "-".join(path).replace("_", "-")
        flag = "FOLDER, the argument" if path == ["model"] else code(flag)
        if model.model_fields[name].annotation is bool:
            flag += f" or `--no-{flag.strip('`-')}`"
        about = one.get("description", "")
        if not about:
            raise SystemExit(f"{'.'.join(path)} has no description: give its Field one")
        default = one.get("default")
        if name == "model":
            default = str(BUNDLED_CHECKPOINT.relative_to(ROOT))
        yield (
            code(".".join(path)),
            flag,
            code(ENV_PREFIX + "__".join(path).upper()),
            kind_of(one, schema),
            "none" if default is None else shown_default(default),
            about,
        )
