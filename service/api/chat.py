"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from models.errors import TemplateError
from service.api import body
from service.api.answer import respond
from service.api.generation import Generation
from service.api.logprobs import chat_logprobs
from service.api.sampling import sampling_params, sparsity_params, token_budget
from service.api.schemas import ChatRequest, StreamOptions
from service.api.state import state_of
from service.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import Request, Response

    from models.tokenizer import Tokenizer
    from service.api.schemas import Message
    from service.engine.types import Delta, TokenLogprob


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    engine = state.decoder
    asked = await body.read(request, ChatRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    prompt = await asyncio.to_thread(chat_tokens, asked.messages, engine.tokenizer)
    max_tokens = token_budget(asked, len(prompt), engine.max_model_len, None, "messages")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    request_id = f"chatcmpl-{uuid4().hex}"
    generation = Generation(
        engine,
        [prompt],
        sampling_params(asked, engine.config.generation, max_tokens, logprobs),
        sparsity_params(asked.sparsity, state.config.sparsity),
        n=asked.n,
        priority=asked.priority,
        request_id=request_id,
        cache_salt=asked.cache_salt or "",
    )
    return await respond(
        request,
        generation,
        _Shape(asked.logprobs),
        request_id=request_id,
        model=engine.model_name,
        prompt_tokens=len(prompt),
        stream=(asked.stream_options or StreamOptions()) if asked.stream else None,
    )


def chat_tokens(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = True
) -> list[int]:
    """A conversation as the model was trained to read it.

    Raises:
        RequestError: as `chat_text` does.
    """
    text = chat_text(messages, tokenizer, add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False)


def chat_text(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = True
) -> str:
    """A conversation in the words of the model's chat template.

    Raises:
        RequestError: there is no chat template, or it does not take these messages.
    """
    # "developer" is OpenAI's newer name of "system", which templates do not know.
    turns = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content,
        }
        for message in messages
    ]
    try:
        return tokenizer.render_chat(turns, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise RequestError(f"messages: {error}", param="messages") from error


class _Shape:
    """Choices of messages."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def opening(self, delta: Delta) -> dict[str, Any]:
        return self._chunk(delta.index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, delta: Delta) -> dict[str, Any]:
        return self._chunk(
            delta.index, {"content": delta.text}, self._written(delta.logprobs), delta
        )

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        end = deltas[-1]
        return {
            "index": end.index,
            "message": {
                "role": "assistant",
                "content": "".join(delta.text for delta in deltas),
                "refusal": None,
            },
            "logprobs": self._written([entry for delta in deltas for entry in delta.logprobs]),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }

    def _written(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(tokens) if self._logprobs else None

    def _chunk(
        self,
        index: int,
        content: dict[str, str],
        logprobs: dict[str, Any] | None,
        end: Delta | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": end.finish_reason if end else None,
            "stop_reason": end.stop_reason if end else None,
        }
