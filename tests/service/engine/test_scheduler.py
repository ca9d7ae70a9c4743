"""The scheduler alone: what each step computes, who waits, and that no page is lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.page import PAGE
from service.engine.pages import PagePool
from service.engine.prefix import PrefixCache
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import TAIL, Request, State
from tests.service.engine.tiny import dynamic, greedy


def make(pages=100, max_seqs=4, chunk=256, step=512, cache=False):
    pool = PagePool(pages)
    limits = Limits(max_seqs, 64, chunk, step)
    return Scheduler(pool, limits, PrefixCache(pool) if cache else None)


def add(scheduler, length, n=1, differs=None, **changes):
    """A request for the first natural numbers, but for what differs from one of them on."""
    differs = length if differs is None else min(differs, length)
    prompt = (*range(1, differs + 1), *(-number for number in range(differs, length)))
    request = Request("r", prompt, greedy(8), dynamic(), 0, None, 0.0, **changes)
    scheduler.add(request, n)
    return request


def advance(scheduler, work):
    """What the engine does with a step: book it, keep pages, fork, append a token.

    Returns:
        Pages to copy, (source, target).
    """
    copies = []
    for item in work:
        sequence = item.sequence
        sequence.computed = item.stop
        sequence.decided = max(sequence.decided, item.stop)
        if scheduler.cache is not None and item.start < sequence.request.tail_start:
            fresh = scheduler.cache.fresh(sequence)
            scheduler.cache.keep(sequence, [(1.0, 1.0)] * len(fresh))
        if item.samples:
            if sequence.generated == 0 and sequence.index == 0:
                copies += scheduler.fork(sequence.request)
            sequence.tokens.append(1)
    return copies


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


def test_choices_do_not_start_before_a_more_urgent_request_that_waits_for_pages():
    for priority, expected in ((0, "waiting"), (1, "running"), (2, "running")):
        scheduler = make(pages=12)
        request = add(scheduler, 300, n=3, priority=1)
        advance(scheduler, scheduler.schedule())
        other = add(scheduler, 600, priority=priority)
        while not request.sequences[0].generated:
            advance(scheduler, scheduler.schedule())
        assert states([request, other]) == ["running", "waiting"]
        assert [choice.state.value for choice in request.sequences[1:]] == [expected] * 2
        if expected == "waiting":
            assert scheduler.waiting == [*other.sequences, *request.sequences[1:]]


def run_out(scheduler):
    """Run all there is to its end, eight tokens each."""
    while scheduler.running or scheduler.waiting:
        advance(scheduler, scheduler.schedule())
        for sequence in list(scheduler.running):
            if sequence.generated == 8:
                scheduler.finish(sequence)


def test_a_full_cache_makes_nobody_wait():
    lengths = [700, 300, 960, 1]
    plain, kept = make(pages=32, max_seqs=8), make(pages=32, max_seqs=8, cache=True)
    for differs in range(5):
        add(kept, 1500, differs=differs)
        run_out(kept)
    assert kept.pool.free == 32
    # All but the pages of an end and its tokens: nothing is blank.
    assert sum(kept.pool._contents[page] is not None for page in range(32)) >= 28
    states = []
    for scheduler in (plain, kept):
        requests = [add(scheduler, length, differs=5) for length in lengths]
        scheduler.schedule()
        states.append([request.sequences[0].state for request in requests])
        run_out(scheduler)

    assert states[0] == states[1]
    assert plain.preemptions >= kept.preemptions
    assert "waiting" in states[0]


def test_what_is_shared_leaves_room_for_more():
    plain, kept = make(pages=32, max_seqs=8), make(pages=32, max_seqs=8, cache=True)
    running = []
    for scheduler in (plain, kept):
        add(scheduler, 1200)
        run_out(scheduler)
        for _ in range(4):
            add(scheduler, 1200)
        scheduler.schedule()
        running.append(len(scheduler.running))
    assert running == [1, 4]
    assert kept.pool.free == 32 - 16 - 4  # of three that each needs, one in its first step
    run_out(kept)
    assert kept.preemptions == 0 and kept.pool.usage == 0


def test_what_waits_knows_what_it_will_find():
    scheduler = make(pages=40, max_seqs=1, cache=True)
    first = add(scheduler, 1000)
    second = add(scheduler, 1000, differs=700)
    other = add(scheduler, 1000, cache_salt="other")
    unfilled = []
    while scheduler.waiting:
        advance(scheduler, scheduler.schedule())
        unfilled.append([request.sequences[0].unfilled for request in (second, other)])
        if first.sequences[0].generated == 8:
            scheduler.finish(first.sequences[0])
            break
    # The first prompt's chunks end at 256, 512, 768 and 872: all pages that it shares with the
    # second are there with the third.
    assert unfilled[:5] == [[1000, 1000], [744, 1000], [488, 1000], [360, 1000], [360, 1000]]
    assert scheduler.schedule()[0].start == 640
    assert (second.cached, other.cached) == (640, None)
    assert second.sequences[0].unfilled == 360


def test_what_is_found_takes_room_where_nobody_held_it():
    scheduler = make(pages=20, cache=True)
    add(scheduler, 1000)
    run_out(scheduler)
    held = scheduler.pool.take(7)
    request = add(scheduler, 1000)  # finds 13 pages, all that are free, and needs three more
    assert scheduler.schedule() == []
    assert request.sequences[0].state is State.WAITING and scheduler.preemptions == 0
    scheduler.pool.release(held)
    assert [item.start for item in scheduler.schedule()] == [832]


def test_what_was_found_counts_as_of_the_start():
    scheduler = make(pages=24, cache=True)
    add(scheduler, 1000)
    run_out(scheduler)
    request = add(scheduler, 1000)
    [sequence] = request.sequences
    scheduler.schedule()
    assert request.cached == sequence.computed == 832
    scheduler._put_back(sequence)  # before its first step has run
    other = scheduler.pool.take(14)  # somebody needs what it found, but for ten pages
    scheduler.schedule()
    assert request.cached is not None and sequence.state is State.WAITING
    scheduler.pool.release(other)
    scheduler.schedule()
    assert request.cached == sequence.computed == 640
    sequence.started = 0.0
    scheduler._put_back(sequence)
    scheduler.pool.release(scheduler.pool.take(24))
    scheduler.schedule()
    assert (request.cached, sequence.computed) == (640, 0)


def spans(scheduler, requests):
    """Run to the end: what each request's first choice computed of its prompt, by step."""
    found = [[] for _ in requests]
    while scheduler.running or scheduler.waiting:
        work = scheduler.schedule()
        for item in work:
            if item.start < item.sequence.prompt_len:
                found[requests.index(item.sequence.request)].append((item.start, item.stop))
        advance(scheduler, work)
        for sequence in list(scheduler.running):
            if sequence.generated == 8:
                scheduler.finish(sequence)
    return found


def test_prompts_that_come_together_compute_their_common_beginning_once():
    scheduler = make(pages=200, max_seqs=8, chunk=256, step=2048, cache=True)
    requests = [
        add(scheduler, 1000),
        add(scheduler, 1000),
        add(scheduler, 1000, differs=500),
        add(scheduler, 1000, differs=500),  # until there as the others, then as the third
        add(scheduler, 600, cache_salt="other"),
    ]
    chunks = [(0, 256), (256, 512), (512, 768), (768, 872)]
    assert spans(scheduler, requests) == [
        [*chunks, (872, 1000)],
        [(832, 872), (872, 1000)],
        [(448, 704), (704, 872), (872, 1000)],
        [(832, 872), (872, 1000)],
        [(0, 256), (256, 472), (472, 600)],
    ]
    assert [request.cached for request in requests] == [0, 832, 448, 832, 0]
    assert scheduler.pool.usage == 0 and scheduler.preemptions == 0


def test_who_waits_for_a_page_goes_on_where_nobody_will_have_it():
    for why in ("given up", "not finite", "put back"):
        scheduler = make(pages=100, max_seqs=2, chunk=256, step=2048, cache=True)
        first, second = (add(scheduler, 1000) for _ in range(2))
        [leader], [follower] = first.sequences, second.sequences
        for start in (0, 256):
            work = scheduler.schedule()
            assert [(item.sequence, item.start) for item in work] == [(leader, start)]
            leader.sealed = why == "not finite" and start == 256
            advance(scheduler, work)
        if why == "given up":
            scheduler.finish(leader)
        if why == "put back":
            scheduler._put_back(leader)
        starts = {item.sequence: item.start for item in scheduler.schedule()}
        assert starts[follower] == (256 if why == "not finite" else 512)
        # The first of them is the other's guide now.
        assert leader not in starts or (why == "not finite" and starts[leader] == 512)


def test_who_may_take_over_no_page_waits_for_none():
    scheduler = make(pages=100, max_seqs=8, chunk=256, step=2048, cache=True)
    echo = Request("e", tuple(range(1, 1001)), greedy(8, prompt_logprobs=1), dynamic(), 0, None, 0)
    add(scheduler, 1000)
    scheduler.add(echo, 1)
    other = add(scheduler, 1000, differs=30)
    assert [item.start for item in scheduler.schedule()] == [0, 0, 0]
    assert other.cached == 0 and echo.cached is None


def test_a_more_urgent_prompt_waits_for_nobody_behind_it():
    scheduler = make(pages=100, step=2048, cache=True)
    add(scheduler, 1000)
    urgent = add(scheduler, 1000, priority=-1)
    assert [item.sequence.request for item in scheduler.schedule()] == [urgent]


def check_pages(scheduler):
    """Every page is held by as many as count on it, or may be found, or is blank."""
    pool = scheduler.pool
    held = Counter(page for sequence in scheduler.running for page in sequence.pages)
    assert pool._users == [held[page] for page in range(pool.pages)]
    assert sorted([*held, *pool._kept, *pool._blank]) == list(range(pool.pages))
    assert {page for page in range(pool.pages) if pool._contents[page]} == set(
        pool._by_key.values()
    )
    assert set(pool._kept) == set(pool._by_key.values()) - set(held)
    assert all(pool._contents[page].key == key for key, page in pool._by_key.items())
    assert not any(sequence.pages for sequence in scheduler.waiting)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_sequence_finishes_and_every_page_comes_back(data):
    pages = data.draw(st.integers(8, 40))
    max_seqs = data.draw(st.integers(1, 5))
    step = data.draw(st.integers(max_seqs + TAIL, 600))
    cache = data.draw(st.booleans())
    scheduler = make(pages, max_seqs, data.draw(st.integers(1, 300)), step, cache)
    longest = pages * 64
    requests = [
        add(
            scheduler,
            data.draw(st.integers(1, longest - 40)),
            data.draw(st.integers(1, 3)),
            data.draw(st.sampled_from([None, 64, 200, 500])),
            priority=data.draw(st.integers(-1, 1)),
            cache_salt=data.draw(st.sampled_from(["", "", "salt"])),
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    memory = {}  # by slot: the token whose key lies there
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
            slots = [page * PAGE + at for page in item.sequence.pages for at in range(PAGE)]
            tokens = item.sequence.tokens
            assert [memory[slot] for slot in slots[: item.start]] == tokens[: item.start]
            memory |= dict(
                zip(slots[item.start : item.stop], tokens[item.start : item.stop], strict=True)
            )
        # Now and then a page comes out that is not fit to be kept.
        if steps % 5 == 4 and data.draw(st.booleans()):
            data.draw(st.sampled_from(work)).sequence.sealed = True
        for source, target in advance(scheduler, work):
            for at in range(PAGE):
                memory[target * PAGE + at] = memory.get(source * PAGE + at)
        for sequence, tokens in lives.items():
            if sequence.state is State.RUNNING and sequence.generated >= tokens:
                scheduler.finish(sequence)
        # Cancelled at any time and in any state; one choice alone once its prompt has forked.
        if data.draw(st.booleans()) and steps % 7 == 0:
            victim = data.draw(st.sampled_from(requests))
            forked = all(s.state is not State.FORKING for s in victim.sequences)
            for sequence in victim.sequences[: 1 if forked and steps % 2 else None]:
                if sequence.state is not State.FINISHED:
                    scheduler.finish(sequence)
        check_pages(scheduler)
        steps += 1
        assert steps < 20_000
    assert scheduler.pool.usage == 0 and not scheduler.running and not scheduler.waiting
