"""The prefix cache under brownout and priorities: what is shared, when, and how it is counted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from service.engine.measures import longest_wait
from service.engine.sequence import State
from tests.service.engine.test_overload import WIDE, ByPosition, Forced
from tests.service.engine.test_prefix import FIRST, SECOND, ask, cached, found, same, whole
from tests.service.engine.test_scheduler import add, make, run_out
from tests.service.engine.tiny import dynamic, greedy, level, prompt_of

PROMPTS = {
    "dense": WIDE,
    "sparse": replace(WIDE, prefill="dynamic", prefill_coverage=0.7),
    "sparse with a floor": replace(WIDE, prefill="dynamic", prefill_coverage=0.7, min_coverage=0.3),
}
LONG = prompt_of(1400)


@pytest.fixture
def harness(harness):
    """Engines on a model whose sparse prompts leave pages unread."""
    return partial(harness, wrap=level)


@pytest.mark.parametrize("prefill", PROMPTS)
def test_levels_share_a_prompts_pages_and_answer_as_each_would_alone(harness, prefill):
    policy, one = PROMPTS[prefill], harness(brownout=Forced(0))
    alone = {
        step: ask(harness(brownout=Forced(step), prefix_cache=False), LONG, policy)
        for step in (0, 2, 3)
    }
    cut = [alone[step][-1].sparsity.fallbacks.get("overload", 0) for step in (0, 2, 3)]
    assert cut[0] == 0 and cut[2] == 133
    for number, step in enumerate((2, 0, 3, 2, 0)):
        one.engine._brownout.level = step
        deltas = ask(one, LONG, policy)
        same(deltas, alone[step])
        # Pages that fell back for their coverage are computed again.
        least = 64 if policy.min_coverage else whole(LONG)
        assert cached(deltas) in (range(least, whole(LONG) + 1) if number else (0,))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one_are_counted_alike_whether_found_or_not(harness, n, tokens):
    off, on = (harness(brownout=Forced(2), prefix_cache=kept) for kept in (False, True))
    for prompt in (FIRST, SECOND, FIRST, [7], FIRST[:128], FIRST[:129]):
        expected, deltas = (ask(one, prompt, WIDE, n=n, tokens=tokens) for one in (off, on))
        same(deltas, expected)
        assert {delta.index for delta in deltas} == set(range(n))
    assert found(on) == (2 * len(FIRST) + len(SECOND) + 258, 640 + whole(FIRST))
    for one in (off, on):
        assert one.engine._scheduler.pool.usage == 0
        assert one.engine.load().queued_tokens == one.engine.load().queued_prompts == 0


def test_priorities_choices_and_what_is_put_back_change_no_answer(harness):
    """All at once in a pool that is too small, with levels that change from token to token."""
    shared = prompt_of(330, 1)
    prompts = [[*shared, *prompt_of(200 + 20 * n, n)] for n in range(5)]
    off = harness(prefix_cache=False, brownout=ByPosition())
    on = harness(pages=18, max_seqs=6, prefill_chunk=100, brownout=ByPosition())

    def calls(one):
        for n, prompt in enumerate(prompts):
            yield one.generate(prompt, greedy(40, logprobs=2), WIDE, n=2, priority=-n % 3)

    expected = [off.run(call)[0] for call in calls(off)]
    for deltas, alone in zip(on.run(*calls(on)), expected, strict=True):
        same(*(sorted(each, key=lambda delta: delta.index) for each in (deltas, alone)))
    scheduler = on.engine._scheduler
    assert scheduler.preemptions > 0 and found(on)[1] > 0
    assert scheduler.pool.usage == 0 and not scheduler.waiting


def test_what_is_looked_up_is_taken_by_who_starts_not_by_who_waits():
    scheduler = make(pages=20, max_seqs=1, cache=True)
    add(scheduler, 1000)
    run_out(scheduler)
    running = add(scheduler, 70)
    scheduler.schedule()
    patient = add(scheduler, 1000, priority=1)
    scheduler.schedule()
    [sequence] = patient.sequences
    assert (sequence.found, sequence.unfilled, sequence.pages) == (13, 168, [])
    # An urgent one of another prompt needs what the patient one would have found.
    urgent = add(scheduler, 1100, differs=0)
    scheduler.finish(running.sequences[0])
    while urgent.sequences[0].generated < 1:
        for item in scheduler.schedule():
            assert item.sequence is urgent.sequences[0]
            item.sequence.computed = item.stop
            if item.samples:
                item.sequence.tokens.append(1)
    scheduler.schedule()
    assert sequence.state is State.WAITING
    left = sequence.found
    assert left < 13 and sequence.unfilled == 1000 - 64 * left
    scheduler.finish(urgent.sequences[0])
    assert [item.start for item in scheduler.schedule()] == [64 * left]
    assert patient.cached == 64 * left
    scheduler.finish(sequence)
    assert scheduler.pool.free == 20


def test_a_request_given_up_while_it_waits_leaves_what_it_had_looked_up(harness):
    one = harness(max_seqs=1)
    ask(one, FIRST, dynamic(), tokens=1)
    engine = one.engine

    async def leave():
        while not engine._scheduler.running:
            await asyncio.sleep(0.001)
        stream = engine.submit(FIRST, greedy(9), dynamic(), request_id="left", priority=3)
        while not (waiting := list(engine._scheduler.waiting)) or not waiting[0].found:
            await asyncio.sleep(0.001)
        stream.close()
        while engine._scheduler.waiting:
            await asyncio.sleep(0.001)

    before = found(one)
    one.run(one.generate(prompt_of(300, 9), greedy(200)), leave())
    assert found(one) == (before[0] + 300, before[1])  # it never started
    assert engine._scheduler.pool.usage == 0 and engine.load().queued_tokens == 0
    assert cached(ask(one, FIRST, dynamic())) == whole(FIRST)


def test_who_has_time_does_not_count_as_waiting():
    scheduler = make(max_seqs=1)
    for priority in (1, 9):
        add(scheduler, 70, priority=priority)
    assert longest_wait(scheduler.waiting) == 0
    add(scheduler, 70, priority=-1)
    assert longest_wait(scheduler.waiting) > 0  # since 0 on the clock
