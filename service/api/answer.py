"""Turns deltas into an answer, whole or streamed; what differs by endpoint is a `Shape`."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from fastapi.responses import JSONResponse, Response

from service.api.chunks import ChunkWriter, Json
from service.api.generation import ClientGoneError, Generation, Reports, Usage, unless_gone
from service.api.reports import attended
from service.api.sse import EventStream
from service.api.state import saccade_version
from service.errors import GenerationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from fastapi import Request

    from service.api.schemas import StreamOptions
    from service.engine.types import Delta


class Shape(Protocol):
    """How one endpoint writes choices.

    Attributes:
        whole_object: `object` of a whole answer.
        chunk_object: `object` of a chunk.
    """

    whole_object: str
    chunk_object: str

    def opening(self, delta: Delta) -> Json | None:
        """A choice's chunk before its first delta's, if there is one."""

    def piece(self, delta: Delta) -> Json:
        """A delta as a choice of a chunk."""

    def whole(self, deltas: Sequence[Delta]) -> Json:
        """All deltas of one choice as a choice of a whole answer."""


async def respond(
    request: Request,
    generation: Generation,
    shape: Shape,
    *,
    request_id: str,
    model: str,
    prompt_tokens: int,
    stream: StreamOptions | None,
) -> Response:
    """Answer one request; its work is aborted when the client leaves.

    Args:
        request: whose connection is watched.
        generation: the work.
        shape: the endpoint's.
        request_id: `id` of the answer.
        model: `model` of the answer.
        prompt_tokens: over all prompts.
        stream: None for a whole answer.

    Raises:
        ServiceError: the engine failed before the first byte was sent.
    """
    head = {
        "id": request_id,
        "object": shape.whole_object if stream is None else shape.chunk_object,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"saccade-{saccade_version()}",
    }
    usage = Usage(prompt_tokens)
    try:
        if stream is None:
            whole = _whole(generation, shape, head, usage)
            try:
                return await unless_gone(request, whole)
            finally:
                generation.close()
        batches = generation.batches()
        try:
            # An error before the first delta is still an HTTP status.
            first = await unless_gone(request, _next(batches))
        except BaseException:
            generation.close()
            raise
        write = ChunkWriter(head, shape, usage, stream)
        chunks = _chunks(
            first, batches, generation.choices, shape, write, usage, stream.include_usage
        )
        return EventStream(chunks, generation.close)
    except ClientGoneError:
        return Response(status_code=499)


async def _whole(generation: Generation, shape: Shape, head: Json, usage: Usage) -> JSONResponse:
    reports = Reports(generation.choices)
    by_choice: list[list[Delta]] = [[] for _ in range(generation.choices)]
    async with aclosing(generation.batches()) as batches:
        async for batch in batches:
            for delta in batch:
                by_choice[delta.index].append(delta)
                usage.add(delta)
                reports.add(delta)

    def written() -> JSONResponse:
        choices = [
            shape.whole(deltas) | reports.of_choice(index) for index, deltas in enumerate(by_choice)
        ]
        usage_and_report = {"usage": usage.as_json(), **reports.of_answer()}
        return JSONResponse({**head, "choices": choices, **usage_and_report})

    # A long echo's log-probabilities take a while to write; other streams go on meanwhile.
    return await asyncio.to_thread(written)


async def _next(batches: AsyncIterator[list[Delta]]) -> list[Delta]:
    async for batch in batches:
        return batch
    raise GenerationError("the engine ended the request without an answer")


async def _chunks(
    first: list[Delta],
    batches: AsyncIterator[list[Delta]],
    choices: int,
    shape: Shape,
    write: ChunkWriter,
    usage: Usage,
    include_usage: bool,
) -> AsyncIterator[list[str]]:
    """The chunks of a stream, as many at once as there are."""
    reports = Reports(choices)
    opened: set[int] = set()
    finished = 0
    batch: list[Delta] | None = first
    while batch is not None:
        chunks = []
        for delta in batch:
            usage.add(delta)
            reports.add(delta)
            if delta.index not in opened:
                opened.add(delta.index)
                opening = shape.opening(delta)
                if opening is not None:
                    chunks.append(write.choice(opening))
            finished += delta.finish_reason is not None
            ends = finished == choices and not include_usage
            extra = attended(delta) | reports.of_choice(delta.index)
            chunks.append(write.piece(delta, extra, reports.of_answer() if ends else None))
        yield chunks
        batch = await anext(batches, None)
    if include_usage:
        yield [write.end(reports.of_answer())]
