"""What an engine says of its load, which decides how many replicas there are."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.service.engine.tiny import dynamic, greedy, prompt_of


def loads_after_steps(one, *calls):
    """The load after each step while `calls` run."""
    engine, seen = one.engine, []
    report = engine._report_load

    def reported():
        report()
        seen.append(engine.load())

    engine._report_load = reported
    one.run(*calls)
    return seen


def test_queued_tokens_fall_with_every_chunk_of_a_prompt(harness):
    one = harness(prefill_chunk=64, pages=100)
    seen = loads_after_steps(one, one.generate(prompt_of(300), greedy(4)))
    # 172 tokens before the tail in chunks, the tail as one, then a token a step.
    queued = [load.queued_tokens for load in seen]
    start = queued.index(236)
    assert queued[start : start + 7] == [236, 172, 128, 0, 0, 0, 0]
    steps = seen[start : start + 7]
    assert [load.queued_prompts for load in steps] == [1, 1, 1, 0, 0, 0, 0]
    assert [load.slots for load in steps] == [1 / 8] * 6 + [0]
    # 236 fit into 4 pages of 64, 300 and what follows into 5.
    assert steps[0].kv_usage == pytest.approx(1 / 100)
    assert steps[4].kv_usage == pytest.approx(5 / 100)
    spent = [load.prefill_seconds for load in steps]
    assert 0 < spent[0] < spent[1] < spent[2] < spent[3]
    # Decode steps are none of it.
    assert spent[3:] == [spent[3]] * 4


def test_prompts_that_wait_count_and_choices_count_once(harness):
    one = harness(max_seqs=2, prefill_chunk=64, pages=100)
    lengths = [100, 200, 300, 150]
    seen = loads_after_steps(
        one, *(one.generate(prompt_of(each), greedy(3), n=2) for each in lengths)
    )
    assert max(load.queued_tokens for load in seen) <= sum(lengths)
    # The last ones wait for a slot while the first run.
    assert max(load.queued_tokens for load in seen if load.slots == 1) >= 300 + 150
    assert seen[-1].queued_tokens == seen[-1].queued_prompts == 0


def test_what_has_arrived_counts_before_the_next_step(harness):
    one = harness()
    engine, began, go = one.engine, threading.Event(), threading.Event()
    run = one.runner.run

    def gated(work):
        began.set()
        assert go.wait(60)
        return run(work)

    one.runner.run = gated
    loads = []

    async def late():
        while not began.is_set():
            await asyncio.sleep(0.005)
        stream = engine.submit(prompt_of(70), greedy(2), dynamic(), request_id="late")
        loads.append(engine.load())
        go.set()
        return [delta async for delta in stream]

    one.run(one.generate(prompt_of(50), greedy(2)), late())
    assert loads[0].queued_tokens >= 70
    assert loads[0].queued_prompts >= 1
    assert engine.load().queued_tokens == 0
    name, labels = "saccade_queued_tokens", {"model_name": "tiny"}
    assert engine.metrics.registry.get_sample_value(name, labels) == 0
