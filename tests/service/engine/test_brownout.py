"""The controller of brownout alone: its laws, and that it settles under a load that lasts."""

from __future__ import annotations

import math
import random
from copy import deepcopy
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.brownout import MOST, SETTLE, WINDOW, Brownout, Targets
from service.engine.cuts import Levels

TARGETS = Targets(wait=2.0, gap=0.1, calm=10.0)
LEVELS = Levels(halvings=2, fixed=True)


def make(levels=LEVELS):
    return Brownout(TARGETS, levels)


def play(one, pressures, start=0.0):
    """A window of each pressure, by waits; the level after each."""
    levels = []
    if start == 0.0:
        one.observe(start, 0.0)
    for number, pressure in enumerate(pressures, 1):
        one.observe(start + number * WINDOW, pressure * TARGETS.wait)
        levels.append(one.level)
    return levels


def test_it_rises_by_one_in_the_time_that_a_level_needs_to_show():
    assert play(make(), [1.5] * 12) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert SETTLE == 3 * WINDOW


def test_either_of_wait_and_gap_is_pressure():
    for gaps, waited in (([0.3], 0.0), ([], 2.1), ([0.05, 0.16], 0.0)):
        one = make()
        one.observe(0.0, 0.0)
        for gap in gaps:
            one.token(gap)
        one.token(None)  # a first token has no gap
        one.observe(1.0, waited)
        assert one.level == 1


def test_a_mean_gap_on_target_is_none():
    one = make()
    one.observe(0.0, 0.0)
    for gap in (0.02, 0.02, 0.2):  # a prompt between two tokens is not overload
        one.token(gap)
    one.observe(1.0, 2.0)
    assert one.level == 0


def test_a_level_that_helps_is_not_left_for_a_higher_one():
    """A queue that gets shorter is still too long."""
    assert play(make(), [1.5, 4.0, 5.0, 4.5, 4.0, 3.0, 2.0, 1.5, 1.1]) == [1] * 9


def test_between_relief_and_target_it_stays():
    one = make()
    levels = play(one, [2.0] * 4 + [0.5, 0.99] * 500)
    assert set(levels[4:]) == {2}


def test_it_returns_by_one_in_each_calm_time():
    one = make()
    assert play(one, [2.0] * 7)[-1] == 3
    levels = play(one, [0.0] * 31, start=7.0)
    assert [levels.index(level) + 1 for level in (2, 1, 0)] == [10, 20, 30]


def test_nothing_is_cut_where_there_is_nothing_to_cut():
    assert set(play(Brownout(), [math.inf] * 50)) == {0}
    assert set(play(make(Levels()), [9.0] * 50)) == {0}
    assert max(play(make(Levels(halvings=1)), [9.0] * 50)) == 1


def test_an_early_fall_makes_the_next_one_wait_longer():
    one, now, waits = make(Levels(halvings=1)), 0.0, []
    play(one, [2.0])
    now = 1.0
    for _ in range(7):
        calm = 0
        while one.level:  # little pressure, but some: the load is there
            play(one, [0.3], start=now)
            now, calm = now + 1, calm + 1
        waits.append(calm)
        while not one.level:
            play(one, [2.0], start=now)
            now += 1
    assert waits == [10, 20, 40, 80, 160, 160, 160]
    assert MOST == 16
    # Long after, a first fall waits as at first.
    while one.level:
        play(one, [0.3], start=now)
        now += 1
    play(one, [0.0] * 200 + [2.0], start=now)
    assert one.level == 1
    now += 201
    assert play(one, [0.3] * 10, start=now)[-1] == 0


PRESSURE = st.one_of(st.just(0.0), st.floats(0, 8))


@settings(max_examples=300, deadline=None)
@given(st.lists(PRESSURE, max_size=80), PRESSURE, PRESSURE)
def test_it_is_bounded_steady_and_monotone_in_pressure(past, low, high):
    one = make()
    levels = [0, *play(one, past)]
    assert all(0 <= level <= LEVELS.last for level in levels)
    assert all(abs(b - a) <= 1 for a, b in pairwise(levels))
    low, high = sorted((low, high))
    other = deepcopy(one)
    [mild], [hard] = (
        play(each, [pressure], start=float(len(past)) or 1e-9)
        for each, pressure in ((one, low), (other, high))
    )
    assert mild <= hard


@settings(max_examples=100, deadline=None)
@given(st.lists(PRESSURE, max_size=300))
def test_it_returns_whatever_has_been(past):
    one = make()
    play(one, past)
    now = float(len(past)) or 1e-9
    quiet, other = deepcopy(one), one
    assert play(quiet, [0.0] * int(LEVELS.last * TARGETS.calm + 1), start=now)[-1] == 0
    assert play(other, [0.4] * int(LEVELS.last * MOST * TARGETS.calm + 1), start=now)[-1] == 0


class Service:
    """A queue before `SLOTS` sequences of `TOKENS` tokens each, decoded faster at higher levels.

    A step takes longer the more sequences it has, as it does where their keys are what is read.
    """

    SLOTS, TOKENS = 16, 60
    BASE, EACH = 0.01, (0.004, 0.0025, 0.0018, 0.001)

    def __init__(self, rate, brownout, seed=0):
        self.random, self.rate, self.brownout = random.Random(seed), rate, brownout
        self.now, self.due = 0.0, 0.0
        self.queue, self.running = [], []
        self.changes, self.waits, self.time_at = [], [], [0.0] * 4

    def run(self, seconds):
        until = self.now + seconds
        while self.now < until:
            self.step()

    def step(self):
        while self.due <= self.now:
            self.queue.append(self.due)
            self.due += self.random.expovariate(self.rate) if self.rate else math.inf
        while self.queue and len(self.running) < self.SLOTS:
            self.waits.append(self.now - self.queue.pop(0))
            self.running.append([self.TOKENS, None])
        level = self.brownout.level
        took = self.BASE + self.EACH[level] * len(self.running)
        self.now += took if self.running else 0.05
        self.time_at[level] += took
        for one in self.running:
            self.brownout.token(None if one[1] is None else self.now - one[1])
            one[0], one[1] = one[0] - 1, self.now
        self.running = [one for one in self.running if one[0]]
        self.brownout.observe(self.now, self.now - self.queue[0] if self.queue else 0.0)
        if self.brownout.level != level:
            self.changes.append((self.now, self.brownout.level))

    @classmethod
    def capacity(cls, level):
        """Requests a second that it bears."""
        return cls.SLOTS / (cls.TOKENS * (cls.BASE + cls.EACH[level] * cls.SLOTS))


@pytest.mark.parametrize("load", [1.05, 1.2, 1.5, 2.0])
def test_it_settles_under_a_load_that_lasts(load):
    """An hour of more load than is borne with whole budgets, and less than with cut ones."""
    service = Service(load * Service.capacity(0), make())
    service.run(3600)
    assert service.brownout.level > 0
    # A lower level is tried ever more rarely.
    levels = [0, *(level for _, level in service.changes)]
    falls = [
        when
        for before, (when, level) in zip(levels, service.changes, strict=False)
        if level < before and when > 600
    ]
    assert all(b - a >= MOST * TARGETS.calm - WINDOW for a, b in pairwise(falls))
    # Waits stay near the target, where without it they grow as long as the load lasts.
    last = sorted(service.waits[len(service.waits) // 2 :])
    assert last[len(last) * 9 // 10] < 2 * TARGETS.wait
    without = Service(load * Service.capacity(0), Brownout())
    without.run(3600)
    assert without.waits[-1] > 60
    # And the load gone, it is back at 0 in the stated time.
    service.rate, service.due = 0.0, math.inf
    while service.queue or service.running:
        service.step()
    gone = service.now
    service.run(LEVELS.last * TARGETS.calm + 2 * WINDOW)
    assert service.brownout.level == 0 and service.now - gone < 40


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_it_stays_out_of_a_load_that_is_borne(load):
    service = Service(load * Service.capacity(0), make())
    service.run(1800)
    assert service.changes == []
