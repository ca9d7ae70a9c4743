"""POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse

from service.api import body
from service.api.chat import chat_text, chat_tokens
from service.api.schemas import DetokenizeRequest, TokenizeRequest
from service.api.state import state_of

if TYPE_CHECKING:
    from fastapi import Request

    from models.tokenizer import Tokenizer


async def tokenize(request: Request) -> JSONResponse:
    """The tokens of a prompt or of a chat."""
    state = state_of(request)
    asked = await body.read(request, TokenizeRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    tokenizer = state.engine.tokenizer
    tokens = await asyncio.to_thread(_tokens, asked, tokenizer)
    answer: dict[str, object] = {
        "count": len(tokens),
        "max_model_len": state.engine.max_model_len,
        "tokens": tokens,
    }
    if asked.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(
            lambda: [tokenizer.token_text(token) for token in tokens]
        )
    if asked.return_offsets:
        answer["text"], answer["offsets"] = await asyncio.to_thread(_offsets, asked, tokenizer)
    return JSONResponse(answer)


async def detokenize(request: Request) -> JSONResponse:
    """The text of tokens, special ones included."""
    state = state_of(request)
    asked = await body.read(request, DetokenizeRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    text = await asyncio.to_thread(
        state.engine.tokenizer.decode, asked.tokens, skip_special_tokens=False
    )
    return JSONResponse({"prompt": text})


def _tokens(asked: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    if asked.prompt is not None:
        return tokenizer.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
    return chat_tokens(asked.messages or [], tokenizer, asked.add_generation_prompt)


def _offsets(asked: TokenizeRequest, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text that the tokens are of, and where in it each one stands, in code points."""
    if asked.prompt is not None:
        return asked.prompt, tokenizer.offsets(asked.prompt, asked.add_special_tokens)
    text = chat_text(asked.messages or [], tokenizer, asked.add_generation_prompt)
    return text, tokenizer.offsets(text, False)
