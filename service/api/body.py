"""From a request's bytes to a checked model, with bounds on both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from service.api.errors import from_validation
from service.errors import RequestError, TooLargeError

if TYPE_CHECKING:
    from starlette.requests import Request

    from service.api.schemas import Bounds

Model = TypeVar("Model", bound=BaseModel)

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "prompt_embeds": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (),
    "suffix": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "continue_final_message": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
}
"""Fields that change an answer and are not offered, with the values that ask for nothing.

They are refused and not ignored: an answer without the tool call or the schema that was asked for
looks like a bad model.
"""


async def read(request: Request, model: type[Model], bounds: Bounds, max_bytes: int) -> Model:
    """Read and check a request's body.

    Raises:
        TooLargeError: the body is larger than `max_bytes`.
        RequestError: it is not JSON, or a field is wrong; `param` names the first.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # Browsers send forms and plain text across sites without asking; JSON they do not.
    if kind != "application/json":
        raise RequestError("the body must be JSON, with the header Content-Type: application/json")
    values = _parse(await _receive(request, max_bytes))
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    for field, harmless in UNSUPPORTED.items():
        if values.get(field) and values[field] not in harmless:
            raise RequestError(
                f"{field} is not supported by this service; leave it out", param=field
            )
    try:
        return model.model_validate(values, context=bounds)
    except ValidationError as error:
        raise from_validation(error) from None


async def _receive(request: Request, max_bytes: int) -> bytes:
    too_large = TooLargeError(
        f"the body is larger than {max_bytes} bytes, the most that this service takes"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _parse(body: bytes) -> Any:
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
        if b"\\ud" in body or b"\\uD" in body:
            # Half of a surrogate pair is valid JSON but no text: no tokenizer takes it.
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("the body holds half of a surrogate pair, which is no text") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON: {error.msg} at character {error.pos + 1}"
        ) from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it nests too deeply"}
        raise RequestError(
            f"the body is not valid JSON: {reason.get(type(error), str(error))}"
        ) from None
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} stands for no number in JSON")
