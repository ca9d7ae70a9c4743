"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from service.api import body
from service.api.answer import respond
from service.api.generation import Generation
from service.api.logprobs import completion_logprobs
from service.api.sampling import sampling_params, sparsity_params, token_budget
from service.api.schemas import CompletionRequest, StreamOptions
from service.api.state import state_of
from service.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import Request, Response

    from models.tokenizer import Tokenizer
    from service.engine.types import Delta, TokenLogprob

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completions(request: Request) -> Response:
    """Continue one or more prompts."""
    state = state_of(request)
    engine = state.decoder
    asked = await body.read(request, CompletionRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    prompts, echoes = await asyncio.to_thread(_prompts, asked, engine.tokenizer)
    max_tokens = token_budget(
        asked, max(map(len, prompts)), engine.max_model_len, DEFAULT_MAX_TOKENS, "prompt"
    )
    _check_echo(asked, prompts, state.config.limits.echo_logprobs)
    request_id = f"cmpl-{uuid4().hex}"
    generation = Generation(
        engine,
        prompts,
        sampling_params(
            asked,
            engine.config.generation,
            max_tokens,
            asked.logprobs,
            asked.logprobs if asked.echo else None,
        ),
        sparsity_params(asked.sparsity, state.config.sparsity),
        n=asked.n,
        priority=asked.priority,
        request_id=request_id,
        cache_salt=asked.cache_salt or "",
    )
    return await respond(
        request,
        generation,
        _Shape(asked, echoes, engine.tokenizer),
        request_id=request_id,
        model=engine.model_name,
        prompt_tokens=sum(map(len, prompts)),
        stream=(asked.stream_options or StreamOptions()) if asked.stream else None,
    )


def _check_echo(asked: CompletionRequest, prompts: list[list[int]], cap: int) -> None:
    """Refuse an echo whose log-probabilities would fill the memory.

    Raises:
        RequestError: naming logprobs.
    """
    if not asked.echo or asked.logprobs is None:
        return
    entries = sum(map(len, prompts)) * (asked.logprobs + 1) * asked.n
    if entries > cap:
        raise RequestError(
            f"logprobs: echoing {entries} log-probabilities (prompt tokens x rivals x n) is more "
            f"than the {cap} that this service gives at once; lower logprobs or n",
            param="logprobs",
        )


def _prompts(asked: CompletionRequest, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt, and the texts to echo."""
    ids = [
        tokenizer.encode(prompt, add_special_tokens=asked.add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in asked.prompt
    ]
    if not asked.echo:
        return ids, [""] * len(ids)
    return ids, [
        prompt if isinstance(prompt, str) else tokenizer.decode(prompt, asked.skip_special_tokens)
        for prompt in asked.prompt
    ]


class _Shape:
    """Choices of text."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self, asked: CompletionRequest, echoes: Sequence[str], tokenizer: Tokenizer
    ) -> None:
        self._n = asked.n
        self._echo = asked.echo
        self._echoes = echoes
        self._logprobs = asked.logprobs is not None
        self._hidden = tokenizer.special_ids if asked.skip_special_tokens else frozenset()
        self._offsets: dict[int, int] = {}  # by choice: characters of its text so far
        # By prompt: they come with its first choice, and every choice echoes them.
        self._prompt_logprobs: dict[int, Sequence[TokenLogprob]] = {}

    def opening(self, delta: Delta) -> dict[str, Any] | None:
        self._note(delta)
        if not self._echo:
            return None
        prompt = delta.index // self._n
        return self._choice(delta.index, self._echoes[prompt], self._prompt_logprobs[prompt], None)

    def piece(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta.index, delta.text, delta.logprobs, delta)

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        self._note(deltas[0])
        index = deltas[0].index
        prompt = index // self._n
        text = self._echoes[prompt] + "".join(delta.text for delta in deltas)
        tokens = [entry for delta in deltas for entry in delta.logprobs]
        return self._choice(index, text, [*self._prompt_logprobs[prompt], *tokens], deltas[-1])

    def _note(self, delta: Delta) -> None:
        prompt = delta.index // self._n
        self._prompt_logprobs.setdefault(prompt, delta.prompt_logprobs or ())

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], end: Delta | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            offset = self._offsets.get(index, 0)
            logprobs, self._offsets[index] = completion_logprobs(tokens, offset, self._hidden)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": end.finish_reason if end else None,
            "stop_reason": end.stop_reason if end else None,
        }
