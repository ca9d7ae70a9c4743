"""One HTTP request's work in the engine: a stream of deltas a prompt, read as one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from service.api.reports import report_json
from service.engine.types import PrefillReport
from service.errors import GenerationError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence

    from fastapi import Request

    from service.engine.engine import Engine
    from service.engine.stream import Stream
    from service.engine.types import Delta, SamplingParams, SparsityParams, SparsityReport
    from service.errors import ServiceError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection; nobody reads the answer."""


class Generation:
    """Every choice of every prompt of one HTTP request.

    Choices are numbered over all prompts: choice c of prompt p is p * n + c.

    Raises:
        RequestError, UnavailableError: from the engine; what was submitted is aborted.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sparsity: SparsityParams,
        *,
        n: int,
        priority: int,
        request_id: str,
        cache_salt: str = "",
    ) -> None:
        self.choices = len(prompts) * n
        self._n = n
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        engine.check_room(self.choices)
        try:
            for number, prompt in enumerate(prompts):
                self._streams.append(
                    engine.submit(
                        prompt,
                        sampling,
                        sparsity,
                        n=n,
                        priority=priority,
                        request_id=f"{request_id}-{number}",
                        cache_salt=cache_salt,
                    )
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Abort what has not finished; harmless at any time."""
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            stream.close()

    async def batches(self) -> AsyncGenerator[list[Delta]]:
        """The deltas of all prompts as they come, numbered over all prompts.

        A batch is what has arrived since the last: one delta, and more where the reader is late.

        Raises:
            GenerationError: the engine failed on a choice.
            UnavailableError: the engine stopped.
        """
        if len(self._streams) == 1:
            stream = self._streams[0]
            async for delta in stream:
                batch = [delta, *stream.more()]
                sound = list(takewhile(_is_sound, batch))
                if sound:
                    yield sound
                if len(sound) < len(batch):
                    raise _trouble(batch[len(sound)])
            return
        arrived: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

        async def forward(number: int, stream: Stream) -> None:
            try:
                async for delta in stream:
                    if not _is_sound(delta):
                        raise _trouble(delta)
                    index = number * self._n + delta.index
                    arrived.put_nowait(replace(delta, index=index))
            except Exception as error:  # noqa: BLE001  raised again where the deltas are read
                arrived.put_nowait(error)
            arrived.put_nowait(None)

        self._tasks = [asyncio.create_task(forward(*item)) for item in enumerate(self._streams)]
        running = len(self._tasks)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield [item]


def _is_sound(delta: Delta) -> bool:
    return delta.finish_reason not in ("error", "abort")


def _trouble(delta: Delta) -> ServiceError:
    if delta.finish_reason == "error":
        return GenerationError(delta.error or "the engine failed on this request")
    return UnavailableError("the request was aborted: the service is stopping", code="aborted")


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request, counted as they come."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompts', found in the prefix cache

    def add(self, delta: Delta) -> None:
        """Count a delta."""
        self.completion_tokens += len(delta.token_ids)
        self.cached_tokens += delta.cached_tokens

    def as_json(self) -> dict[str, object]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Reports:
    """What the choices' attention did, collected as they finish."""

    choices: int
    by_choice: dict[int, SparsityReport] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        """Note a delta's report if it carries one."""
        if delta.sparsity is not None:
            self.by_choice[delta.index] = delta.sparsity

    def of_choice(self, index: int) -> dict[str, object]:
        """`sparsity` of one choice, as a field to merge in; empty for a lone choice."""
        report = self.by_choice.get(index)
        return {} if report is None or self.choices == 1 else {"sparsity": report_json(report)}

    def of_answer(self) -> dict[str, object]:
        """`sparsity` of the whole answer, as a field to merge in.

        Means over the choices, except `coverage_p5`, the lowest of theirs, and `fallbacks`, sums.
        """
        reports = list(self.by_choice.values())
        if not reports:
            return {}
        coverages = [one.coverage for one in reports if one.coverage is not None]
        lows = [one.coverage_p5 for one in reports if one.coverage_p5 is not None]
        reasons = sorted({reason for one in reports for reason in one.fallbacks})
        merged = replace(
            reports[0],
            density=_mean([one.density for one in reports]),
            coverage=_mean(coverages) if coverages else None,
            coverage_p5=min(lows, default=None),
            keys_attended=_mean([one.keys_attended for one in reports]),
            prefill=_prefill_of(reports),
            fallbacks={
                reason: sum(one.fallbacks.get(reason, 0) for one in reports) for reason in reasons
            },
        )
        return {"sparsity": report_json(merged)}


def _prefill_of(reports: Sequence[SparsityReport]) -> PrefillReport | None:
    """Means over the prompts; choices of the same prompt say the same."""
    prefills = [one.prefill for one in reports if one.prefill is not None]
    if not prefills:
        return None
    coverages = [one.coverage for one in prefills if one.coverage is not None]
    return PrefillReport(
        prefills[0].policy,
        _mean([one.density for one in prefills]),
        _mean(coverages) if len(coverages) == len(prefills) else None,
    )


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """Run `work`, but give it up when the client closes the connection.

    Raises:
        ClientGoneError: the client left first; `work` has been cancelled.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    # The body has been read, so the next message can only be the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
