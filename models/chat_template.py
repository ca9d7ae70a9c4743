"""Chat templates: from a list of messages to the text that the model was trained on."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import CheckpointError, TemplateError
from models.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2 import nodes
    from jinja2.parser import Parser


LARGEST = 1 << 26
"""Characters of a text, or items of a list, that a template may build by one operation."""


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in a sandbox and within a time limit.

    The template comes from the checkpoint; the messages come from users, and are data only.

    Args:
        source: the template.
        file: where it comes from, as messages name it.
        tokens: texts of special tokens by name, for example {"bos_token": "<s>"}.
        limit: seconds that one rendering may take.

    Raises:
        TemplateError: when the template does not parse.
    """

    def __init__(
        self, source: str, file: str, tokens: Mapping[str, str], limit: float = 2.0
    ) -> None:
        self.source, self.file, self.limit = source, file, limit
        self._tokens = dict(tokens)
        self._environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        try:
            self._code = self._environment.compile(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{file} is not a valid chat template: {error}.") from error

    @staticmethod
    def from_folder(folder: Path, config: Fields, tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The folder's template: a file of its own comes before tokenizer_config.json's.

        Args:
            folder: the checkpoint.
            config: tokenizer_config.json.
            tokens: texts of special tokens by name.

        Returns:
            None when the checkpoint has no template.

        Raises:
            CheckpointError: when a file is not readable.
            TemplateError: when the template does not parse.
        """
        plain, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
        if plain.exists():
            try:
                return ChatTemplate(plain.read_text(encoding="utf-8"), str(plain), tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{plain} cannot be read ({error}); fetch the file again."
                ) from error
        fields = Fields.read(wrapped) if wrapped.exists() else config
        source = fields.values.get("chat_template")
        if isinstance(source, list):
            # Several templates by name, for example one for tools.
            items = [item for item in source if isinstance(item, dict)]
            source = {item.get("name"): item.get("template") for item in items}.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise fields.wrong("chat_template", "a template")
        return ChatTemplate(source, fields.source, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt, special tokens written out: encode it without adding special tokens.

        Args:
            messages: in OpenAI's shape, "role" and "content" each.
            tools: definitions of functions, for templates that know them.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further template variables, for example `enable_thinking`.

        Raises:
            TemplateError: when the template refuses the messages, fails on them, or takes longer
                than the limit.
        """
        environment = self._environment.overlay()
        environment.deadline = time.monotonic() + self.limit
        template = jinja2.Template.from_code(
            environment, self._code, environment.make_globals(None)
        )
        pieces = []
        try:
            for piece in template.generate(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
                **variables,
            ):
                environment.check_deadline()
                pieces.append(piece)
        except _Refusal as refusal:
            raise TemplateError(f"The chat template refuses these messages: {refusal}") from refusal
        except _TimeOver as error:
            raise TemplateError(
                f"The chat template took longer than {self.limit:g} seconds over these messages; "
                "send fewer or shorter ones."
            ) from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise TemplateError(
                f"The chat template fails on these messages ({type(error).__name__}: {error}); "
                "give each message a role and a text content that the model knows."
            ) from error
        return "".join(pieces)


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _TimeOver(Exception):  # noqa: N818  (never leaves this file)
    """The deadline has passed."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that looks at the clock wherever a template touches its data or multiplies.

    What it cannot interrupt is a loop over a list that touches nothing.
    """

    deadline: float = float("inf")
    intercepted_binops = frozenset(("*", "**", "+"))

    def check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise _TimeOver

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_deadline()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_deadline()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_deadline()
        if operator == "**":
            raise TypeError("templates do not raise to powers")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int):
                    _check_size(len(one) * other)
        elif hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_deadline()
        return super().call(context, function, *args, **kwargs)


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise MemoryError(f"a text or list of {size} items")


class _Generation(Extension):
    """The `generation` block, which marks the assistant's words for training: its body is kept."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads a set here)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it; jinja2's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
