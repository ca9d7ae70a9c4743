"""Sends one request and reads its answer.

Over aiohttp, whose parser is in C: of 200 streams with 50 one-token events a second each it reads
38,000 to 45,000 events a second of CPU time, httpx 14,000 to 18,000; as fast as they come, 130,000
to 160,000 and 50,000 (`tests/bench/load_client.py`, one core of an Intel Xeon).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import aiohttp

from service.load.events import DONE, EventReader, carries_tokens, parse
from service.load.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.load.target import Target

_DETAIL = 300
"""Characters of a server's error that are kept."""


class StreamError(Exception):
    """The server sent an error, or no JSON, in the midst of an answer."""


class TruncatedError(Exception):
    """The answer stopped before its end."""


class StatusError(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Client:
    """Requests to one target; each may take `timeout` seconds.

    Args:
        session: its connections.
        target: where to.
        timeout: seconds a request, from its sending to its end.
        now: seconds since the start of the run.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        timeout: float,
        now: Callable[[], float],
    ) -> None:
        self._session = session
        self._target = target
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._now = now

    async def send(
        self, body: bytes, due: float | None, prompt_tokens: int, session: str | None = None
    ) -> Outcome:
        """One request; what goes wrong is in the outcome.

        Args:
            body: of the request.
            due: when it should have been sent; None is now.
            prompt_tokens: as planned.
            session: told in the header `x-session-id`, if any.
        """
        sent = self._now()
        outcome = Outcome(sent if due is None else due, sent, prompt_tokens)
        try:
            await self._read(body, session, outcome)
        except StatusError as error:
            outcome.error, outcome.detail = f"http {error.status}", str(error)[:_DETAIL]
        except StreamError as error:
            outcome.error, outcome.detail = "stream error", str(error)[:_DETAIL]
        except TimeoutError:
            outcome.error = "timeout"
        except (TruncatedError, aiohttp.ClientPayloadError) as error:
            outcome.error, outcome.detail = "truncated", str(error)[:_DETAIL]
        except (aiohttp.ClientError, OSError) as error:
            # A connection that breaks behind the headers has cut an answer short.
            outcome.error = "truncated" if outcome.tokens_at else "connection"
            outcome.detail = (str(error) or type(error).__name__)[:_DETAIL]
        outcome.ended = outcome.ended or self._now()
        if not outcome.output_tokens:
            outcome.output_tokens = len(outcome.tokens_at)
        return outcome

    async def _read(self, body: bytes, session: str | None, outcome: Outcome) -> None:
        target, reader = self._target, EventReader()
        headers = target.headers | ({} if session is None else {"x-session-id": session})
        async with self._session.post(
            target.address, data=body, headers=headers, timeout=self._timeout
        ) as answer:
            if answer.status != 200:
                raise StatusError(answer.status, await answer.text(errors="replace"))
            async for piece in answer.content.iter_any():
                now = self._now()
                for data in reader.feed(piece):
                    if data == DONE:
                        outcome.ended = now
                        await _drain(answer)
                        return
                    _note(data, now, outcome)
        raise TruncatedError("the connection was closed before [DONE]")


def clock() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


async def _drain(answer: aiohttp.ClientResponse) -> None:
    """Read the end of an answer that is whole, so that its connection can be used again."""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        await asyncio.wait_for(answer.read(), 1)


def _note(data: bytes, now: float, outcome: Outcome) -> None:
    """Add an event to its outcome.

    Raises:
        StreamError: it is an error, or no JSON object.
    """
    try:
        chunk = parse(data)
    except ValueError as error:
        raise StreamError(f"an event is not JSON: {error}") from None
    if "error" in chunk:
        said = chunk["error"]
        raise StreamError(str(said.get("message", said) if isinstance(said, dict) else said))
    if carries_tokens(chunk):
        outcome.tokens_at.append(now)
    usage = chunk.get("usage")
    if usage:
        outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
        outcome.output_tokens = usage.get("completion_tokens", outcome.output_tokens)
    if "sparsity" in chunk:
        outcome.sparsity = chunk["sparsity"]
