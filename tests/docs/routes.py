"""The sections of docs/server.md: the routes of both applications, what they take and give."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from string import Formatter
from types import SimpleNamespace

from starlette.routing import Route

from service.api.app import create_app
from service.api.body import UNSUPPORTED
from service.api.schemas import Body, GenerationRequest, SparsityRequest
from service.config import LimitsConfig, ServiceConfig
from service.encoders.app import create_encoder_app
from service.sparsity import SparsityConfig
from tests.docs.answer_parts import PARTS
from tests.docs.answers import ANSWERS, QUERIES
from tests.docs.fields import kind_of, shown_default
from tests.docs.markdown import code, table
from tests.docs.meanings import HIDDEN, KINDS, MEANINGS

SHARED = {GenerationRequest: "fields of completions and chats", SparsityRequest: "sparsity"}
"""Models with a section of their own, by its heading."""
NAMES = ("field", "type", "default", "meaning")


def applications():
    """The routes of a decoder's and of an encoder's application, each in its order."""
    stand_in, config = SimpleNamespace(model_name="", max_model_len=0), ServiceConfig()
    return {
        "decoder": _routes(create_app(stand_in, config)),
        "encoder": _routes(create_encoder_app(stand_in, config)),
    }


def _routes(app):
    """(method, path, handler); those that only refuse are left out."""
    return [
        (method, route.path.replace(":path", ""), route.endpoint)
        for route in app.routes
        if isinstance(route, Route)
        and inspect.signature(route.endpoint).return_annotation != "NoReturn"
        for method in sorted((route.methods or {"GET"}) - {"HEAD"})
    ]


def everything():
    """(method, path): (handler, the kinds of models that offer it)."""
    found = {}
    for kind, routes in applications().items():
        for method, path, handler in routes:
            found.setdefault((method, path), (handler, []))[1].append(kind)
    return found


def index():
    """A line for each route."""
    rows = [
        (
            f"[{code(f'{method} {path}')}](#{anchor(f'{method} {path}')})",
            about(handler),
            "any" if len(kinds) == 2 else kinds[0],
        )
        for (method, path), (handler, kinds) in everything().items()
    ]
    return table(("route", "what it answers", "models"), rows)


def sections():
    """A section for each route."""
    return "\n\n".join(
        _section(method, path, handler) for (method, path), (handler, _) in everything().items()
    )


def shared():
    """The sections that several routes refer to."""
    parts = {heading: table(NAMES, rows(model)) for model, heading in SHARED.items()}
    parts |= {heading: _told(fields) for heading, fields in PARTS.items()}
    return "\n\n".join(
        f"### {heading[0].upper()}{heading[1:]}\n\n{text}" for heading, text in parts.items()
    )


def unsupported():
    """Fields that are refused, with the values that ask for nothing."""
    return table(
        ("field", "taken where it is absent, null, empty, or"),
        [
            (code(name), ", ".join(code(value) for value in values).replace("'", '"') or "-")
            for name, values in UNSUPPORTED.items()
        ],
    )


def anchor(heading):
    """GitHub's name of a heading."""
    kept = (letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return "".join(kept).replace(" ", "-")


def about(handler):
    """What a handler's docstring says first."""
    return inspect.cleandoc(handler.__doc__).split("\n\n")[0].replace("\n", " ")


def body_of(handler):
    """The model that a handler reads its body as; None where it reads none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(handler)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "body.read":
            return handler.__globals__[node.args[1].id]
    return None


def rows(model, prefix=""):
    """Rows of a model's own fields, in their order; objects within it are spread out."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        owner = _owner(model, name)
        if owner is not model and owner in SHARED:
            continue
        key = f"{owner.__name__}.{name}"
        if key in HIDDEN:
            continue
        one = schema["properties"][name]
        inner = _inner(field.annotation)
        path = f"{prefix}{name}"
        if inner in SHARED:
            yield code(path), "object", "", f"See [{SHARED[inner]}](#{anchor(SHARED[inner])})."
            continue
        default = "required" if field.is_required() else _default(model, name, field.default)
        kind = KINDS.get(key) or kind_of(one, schema)
        yield code(path), kind, default, meaning(key)
        if inner is not None:
            within = f"{path}[]." if "list" in str(field.annotation).lower() else f"{path}."
            yield from rows(inner, within)


def _default(model, name, default):
    if model is SparsityRequest:
        given = SparsityConfig.model_fields.get(name)
        if given is not None and given.default is not None:
            return f"the service's: {shown_default(given.default)}"
        return "the service's" if given is not None else ""
    if default is None or isinstance(default, Body):
        return ""
    return shown_default(default)


@cache
def _limits():
    return {
        name: f"{field.default:,} (`limits.{name}`)"
        for name, field in LimitsConfig.model_fields.items()
    }


def meaning(key):
    """What a field means, with the service's limits filled in.

    Raises:
        SystemExit: nobody has written it.
    """
    owner, _, name = key.partition(".")
    config = SparsityConfig.model_fields.get(name) if owner == "SparsityRequest" else None
    if key not in MEANINGS and config is not None and config.description:
        return config.description
    if key not in MEANINGS:
        raise SystemExit(f"tests/docs/meanings.py does not say what {key} means")
    return Formatter().vformat(MEANINGS[key], (), _limits())


def used_keys():
    """Keys of all fields that the page shows."""
    models = {body_of(handler) for handler, _ in everything().values()} - {None}
    found, waiting = set(), [*models, *SHARED]
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            inner = _inner(field.annotation)
            if inner is not None:
                waiting.append(inner)
            if inner not in SHARED:
                found.add(f"{_owner(model, name).__name__}.{name}")
    return found - HIDDEN


def _owner(model, name):
    """The class that declares a field."""
    return next(one for one in reversed(model.__mro__) if name in getattr(one, "model_fields", {}))


def _inner(annotation):
    """The model within an annotation, if there is one."""
    if inspect.isclass(annotation) and issubclass(annotation, Body):
        return annotation
    for one in getattr(annotation, "__args__", ()):
        found = _inner(one)
        if found is not None:
            return found
    return None


def _section(method, path, handler):
    parts = [f"### {method} {path}", about(handler)]
    model = body_of(handler)
    if model is not None:
        parts.append("Body:")
        own = list(rows(model))
        parts.append(table(NAMES, own))
        for base, heading in SHARED.items():
            if issubclass(model, base):
                parts.append(f"And all [{heading}](#{anchor(heading)}).")
    if (method, path) in QUERIES:
        names = ("parameter", "values", "default", "meaning")
        parts += ["Parameters of the address:", table(names, QUERIES[method, path])]
    for heading, fields in ANSWERS[method, path].items():
        if isinstance(fields, str):
            parts.append(fields)
        else:
            parts += [f"{heading}:", _told(_shortened(fields))]
    return "\n\n".join(parts)


def _told(fields):
    """A table of an answer's fields."""
    rows = [(code(name), kind, text) for name, (kind, text) in fields.items()]
    return table(("field", "type", "meaning"), rows)


def _shortened(fields):
    """The fields with a line in place of each part that is told elsewhere."""
    for heading, part in PARTS.items():
        if part.keys() <= fields.keys():
            first = next(iter(part))
            whole = first if part[first][0] == "object" else first.rpartition(".")[0]
            line = {whole: ("object", f"See [{heading}](#{anchor(heading)}).")}
            before, behind = {}, {}
            for name, told in fields.items():
                if name not in part:
                    (behind if before.keys() & line.keys() else before)[name] = told
                elif name == first:
                    before |= line
            fields = before | behind
    return fields
