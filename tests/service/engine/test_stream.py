"""From the engine's thread to the readers in an event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.engine.stream import Stream, deliver
from service.engine.types import Delta


def delta(text, end=None):
    return Delta(0, text, (1,), (), end)


def from_a_thread(parcels):
    thread = threading.Thread(target=deliver, args=(parcels,))
    thread.start()
    thread.join()


def test_a_step_wakes_a_loop_once_and_every_stream_reads_its_own(monkeypatch):
    async def main():
        streams = [Stream(1, lambda: None) for _ in range(5)]
        readers = [asyncio.create_task(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        loop, woken = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *given: woken.append(given) or call(*given)
        )
        from_a_thread((stream, [delta(str(n))]) for n, stream in enumerate(streams))
        assert len(woken) == 1
        return [one.text for one in await asyncio.gather(*readers)]

    assert asyncio.run(main()) == ["0", "1", "2", "3", "4"]


def test_a_late_reader_takes_all_that_is_there():
    async def main():
        stream = Stream(2, lambda: None)
        assert stream.more() == []
        from_a_thread([(stream, [delta("a"), delta("b", "stop")])])
        from_a_thread([(stream, [delta("c", "stop")])])
        first = await anext(stream)
        rest = stream.more()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return [one.text for one in (first, *rest)]

    assert asyncio.run(main()) == ["a", "b", "c"]


def test_a_reader_that_was_cancelled_leaves_what_came_to_the_next():
    async def main():
        stream = Stream(1, lambda: None)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        from_a_thread([(stream, [delta("a")])])
        with pytest.raises(asyncio.CancelledError):
            await reader
        return await anext(stream)

    assert asyncio.run(main()).text == "a"


def test_streams_of_a_closed_loop_are_aborted_and_those_of_others_are_not():
    aborted = []

    async def make(name):
        return Stream(1, lambda: aborted.append(name))

    closed = asyncio.run(make("closed"))

    async def main():
        stream = await make("open")
        from_a_thread([(closed, [delta("x")]), (stream, [delta("a")])])
        return await anext(stream)

    assert asyncio.run(main()).text == "a"
    assert aborted == ["closed"]
