"""The scheduler alone: what each step computes, who waits, and that no page is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.pages import PagePool
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import TAIL, Request, State
from tests.service.engine.tiny import dynamic, greedy


def make(pages=100, max_seqs=4, chunk=256, step=512):
    return Scheduler(PagePool(pages), Limits(max_seqs, 64, chunk, step))


def add(scheduler, length, n=1, priority=0):
    prompt = tuple(range(1, length + 1))
    request = Request("r", prompt, greedy(8), dynamic(), 0, None, 0.0, priority=priority)
    scheduler.add(request, n)
    return request


def advance(scheduler, work):
    """What the engine does with a step: book it, fork, append a token."""
    for item in work:
        sequence = item.sequence
        sequence.computed = item.stop
        sequence.decided = max(sequence.decided, item.stop)
        if item.samples:
            if sequence.generated == 0 and sequence.index == 0:
                scheduler.fork(sequence.request)
            sequence.tokens.append(1)


def test_the_tail_of_a_prompt_is_never_cut():
    scheduler = make(chunk=100)
    add(scheduler, 500)
    spans = []
    for _ in range(6):
        [item] = work = scheduler.schedule()
        spans.append((item.start, item.stop))
        advance(scheduler, work)
    assert spans == [(0, 100), (100, 200), (200, 300), (300, 372), (372, 500), (500, 501)]


def test_decode_tokens_come_first_and_the_budget_holds():
    scheduler = make(step=4 + TAIL, chunk=1000)
    add(scheduler, 100)
    advance(scheduler, scheduler.schedule())
    add(scheduler, 1000)
    work = scheduler.schedule()
    assert [item.count for item in work] == [1, 4 + TAIL - 1]


def test_first_come_first_served():
    scheduler = make(pages=20, max_seqs=2)
    requests = [add(scheduler, 600) for _ in range(3)]
    scheduler.schedule()
    assert [r.sequences[0].state for r in requests] == ["running", "running", "waiting"]
    scheduler.finish(requests[0].sequences[0])
    scheduler.schedule()
    assert requests[2].sequences[0].state is State.RUNNING


def states(requests):
    return [request.sequences[0].state.value for request in requests]


def test_the_lowest_priority_goes_first_and_within_one_the_first_that_came():
    scheduler = make(max_seqs=1)
    requests = [add(scheduler, 70, priority=p) for p in (0, 5, 0, -3, 5, -3)]
    order = []
    while scheduler.waiting or scheduler.running:
        work = scheduler.schedule()
        order.append(requests.index(work[0].sequence.request))
        advance(scheduler, work)
        scheduler.finish(work[0].sequence)
    assert order == [3, 5, 0, 2, 1, 4]


def test_priorities_are_strict_and_do_not_interrupt():
    """While more urgent requests keep coming others wait, and go on when none is left."""
    scheduler = make(max_seqs=1)
    running = add(scheduler, 70, priority=9)
    advance(scheduler, scheduler.schedule())
    patient = add(scheduler, 70, priority=1)
    for _ in range(50):
        urgent = add(scheduler, 70)
        advance(scheduler, scheduler.schedule())
        assert states([running, patient, urgent]) == ["running", "waiting", "waiting"]
        scheduler.finish(running.sequences[0])
        running = urgent
    scheduler.schedule()
    scheduler.finish(running.sequences[0])
    scheduler.schedule()
    assert states([patient]) == ["running"]


def test_prompts_are_computed_by_priority():
    scheduler = make(step=4 + TAIL, chunk=1000)
    add(scheduler, 1000)
    advance(scheduler, scheduler.schedule())
    urgent = add(scheduler, 1000, priority=-1)
    [item] = scheduler.schedule()
    assert item.sequence.request is urgent


def test_the_newest_of_the_highest_priority_is_put_back_for_pages():
    scheduler = make(pages=12, max_seqs=5, chunk=64, step=600)
    first, low, later_low, urgent = requests = [
        add(scheduler, 64 * 3 - 1, priority=p) for p in (0, 2, 2, -1)
    ]
    while not all(r.sequences[0].generated for r in requests):
        advance(scheduler, scheduler.schedule())
    assert scheduler.pool.free == 0
    put_back = []
    for _ in range(2 * 64 + 2):
        advance(scheduler, scheduler.schedule())
        put_back += [r for r in requests if r not in put_back and states([r]) == ["waiting"]]
    # Each time that the others begin a page.
    assert put_back[:2] == [later_low, low]
    assert states([first, urgent]) == ["running", "running"]


def test_what_is_put_back_is_the_first_of_its_priority_again():
    scheduler = make(pages=6, max_seqs=2)
    old, new = add(scheduler, 190, priority=1), add(scheduler, 190, priority=1)
    while not new.sequences[0].generated:
        advance(scheduler, scheduler.schedule())
    other, urgent = add(scheduler, 70, priority=1), add(scheduler, 70)
    while states([new]) == ["running"]:
        advance(scheduler, scheduler.schedule())
    assert [s.request for s in scheduler.waiting] == [urgent, new, other]
    assert states([old]) == ["running"]


def test_choices_share_the_prompts_whole_pages():
    scheduler = make()
    request = add(scheduler, 200, n=3)
    while request.sequences[1].state is State.FORKING:
        advance(scheduler, scheduler.schedule())
    tables = [sequence.pages for sequence in request.sequences]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    for sequence in request.sequences:
        scheduler.finish(sequence)
    assert scheduler.pool.usage == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_sequence_finishes_and_every_page_comes_back(data):
    pages = data.draw(st.integers(8, 40))
    max_seqs = data.draw(st.integers(1, 5))
    step = data.draw(st.integers(max_seqs + TAIL, 600))
    scheduler = make(pages, max_seqs, data.draw(st.integers(1, 300)), step)
    longest = pages * 64
    requests = [
        add(
            scheduler,
            data.draw(st.integers(1, longest - 40)),
            data.draw(st.integers(1, 3)),
            data.draw(st.integers(-1, 1)),
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    lives = {s: data.draw(st.integers(1, 40)) for r in requests for s in r.sequences}
    steps = 0
    while any(s.state is not State.FINISHED for s in lives):
        work = scheduler.schedule()
        assert work, "a step without work would never end"
        assert sum(item.count for item in work) <= step
        assert len({item.sequence for item in work}) == len(work)
        for item in work:
            assert item.start == item.sequence.computed
            assert len(item.sequence.pages) * 64 >= item.stop
        held = [p for s in scheduler.running for p in s.pages]
        assert len(set(held)) == pages - scheduler.pool.free
        advance(scheduler, work)
        for sequence, tokens in lives.items():
            if sequence.state is State.RUNNING and sequence.generated >= tokens:
                scheduler.finish(sequence)
        # Cancelled at any time, in any state but before its prompt has forked.
        if data.draw(st.booleans()) and steps % 7 == 0:
            victim = data.draw(st.sampled_from(requests))
            for sequence in victim.sequences:
                if sequence.state is not State.FINISHED:
                    scheduler.finish(sequence)
        steps += 1
        assert steps < 20_000
    assert scheduler.pool.usage == 0 and not scheduler.running and not scheduler.waiting
