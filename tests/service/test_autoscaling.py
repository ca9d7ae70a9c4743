"""The autoscaling policy against series of load, and as Serve calls it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve.config import AutoscalingPolicy

from service.autoscaling import (
    FIELDS,
    POLICY,
    Limits,
    ReplicaLoad,
    decide,
    needed,
    sufficient,
)
from service.engine.types import Load
from service.occupancy import Meter

LIMITS = Limits(
    queued_tokens_per_replica=1000, kv_usage=0.8, upscale_delay_s=3, downscale_delay_s=30
)
IDLE = ReplicaLoad(0, 0, 0.0, 0.0)


def queue(tokens, prompts=100, occupancy=1.0):
    return ReplicaLoad(tokens, prompts, 0.1, occupancy)


@pytest.mark.parametrize(
    ("loads", "replicas"),
    [
        ([], 1),
        ([IDLE, IDLE], 1),
        ([queue(1000)], 1),
        ([queue(1001)], 2),
        ([queue(500), queue(3400)], 4),
        ([queue(1_000_000, prompts=1)], 1),
        ([queue(1_000_000, prompts=2), queue(10, prompts=1)], 3),
        ([ReplicaLoad(0, 0, 0.8, 0.8)], 1),
        ([ReplicaLoad(0, 0, 0.81, 0.81)], 2),
        ([ReplicaLoad(0, 0, 0.8, 0.8)] * 3, 3),
    ],
)
def test_replicas_needed_by_tokens_prompts_and_cache(loads, replicas):
    assert needed(loads, LIMITS) == replicas


@pytest.mark.parametrize(
    ("loads", "replicas"),
    [
        ([IDLE] * 4, 1),
        ([queue(701, occupancy=0.0)], 2),
        ([ReplicaLoad(0, 0, 0.1, 0.7)], 1),
        ([ReplicaLoad(0, 0, 0.1, 0.5)] * 3, 3),  # busy without a queue: two would be at 75%
        ([ReplicaLoad(0, 0, 0.1, 0.4)] * 3, 2),
        ([ReplicaLoad(0, 0, 0.57, 0.57)], 2),  # 0.7 of 0.8
    ],
)
def test_replicas_that_hold_a_load_with_room_to_spare(loads, replicas):
    assert sufficient(loads, LIMITS) == replicas


load_lists = st.lists(
    st.builds(
        ReplicaLoad,
        st.integers(0, 10**7),
        st.integers(0, 100),
        st.floats(0, 1),
        st.floats(0, 1),
    ),
    max_size=5,
)


@given(load_lists)
def test_what_holds_with_room_is_never_fewer_than_what_is_needed(loads):
    assert sufficient(loads, LIMITS) >= needed(loads, LIMITS) >= 1


def play(series, target=1, limits=LIMITS, complete=True, step=0.5):
    """Targets over a series of (seconds, loads); loads may be a function of the target."""
    window, now, targets = None, 100.0, []
    for seconds, loads in series:
        for _ in range(math.ceil(seconds / step)):
            seen = loads(target) if callable(loads) else loads
            target, window = decide(now, target, seen, complete, window, limits)
            targets.append(target)
            now += step
            assert len(window.peaks) <= max(targets) + 10
    return targets


def test_a_queue_adds_replicas_after_the_delay_and_not_before():
    targets = play([(3, [queue(3500)]), (1, [queue(3500)])])
    assert targets == [1] * 6 + [4] * 2


def test_a_spike_shorter_than_the_delay_adds_none():
    assert set(play([(2.5, [queue(9000)]), (1, [IDLE]), (2.5, [queue(9000)]), (5, [IDLE])])) == {1}


def test_without_a_delay_a_queue_adds_replicas_at_once():
    limits = Limits(1000, 0.8, 0, 0)
    assert play([(0.5, [queue(1500)]), (0.5, [IDLE])], limits=limits) == [2, 1]


def test_replicas_go_only_after_a_whole_window_of_little_load():
    targets = play([(29.5, [IDLE] * 3), (2, [IDLE] * 3)], target=3)
    assert targets == [3] * 60 + [1] * 3


def test_one_peak_in_the_window_keeps_what_it_needs():
    busy = ReplicaLoad(0, 0, 0.1, 0.45)  # 3 x 0.45 / 0.7: two hold it
    targets = play([(40, [IDLE] * 3), (1, [busy] * 3), (29, [IDLE] * 3), (2, [IDLE] * 3)], target=3)
    assert targets[60] == 1
    targets = play([(20, [IDLE] * 3), (1, [busy] * 3), (28, [IDLE] * 3), (4, [IDLE] * 3)], target=3)
    assert targets[59] == 3
    assert targets[62] == 2
    assert targets[-1] == 1


def test_none_goes_while_one_does_not_report():
    assert set(play([(100, [IDLE])], target=3, complete=False)) == {3}


def test_one_that_does_not_report_does_not_hinder_adding():
    assert play([(4, [queue(5000)])], target=2, complete=False)[-1] == 5


def test_a_steady_load_does_not_flap():
    """Work for 1.5 replicas: one has a growing queue, two have none and are 75% busy."""
    backlog = [0.0]

    def loads(replicas):
        backlog[0] = max(0.0, backlog[0] + (1.5 - replicas) * 100)
        occupancy = 1.0 if backlog[0] else min(1.0, 1.5 / replicas)
        return [queue(backlog[0] / replicas, occupancy=occupancy)] * replicas

    targets = play([(600, loads)])
    changes = [late - early for early, late in itertools.pairwise(targets) if late != early]
    # Up for the backlog, and at most down to what holds; never up again.
    assert changes[0] > 0
    assert all(change < 0 for change in changes[1:])
    assert targets[-1] in (2, 3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), load_lists), max_size=8), st.integers(1, 6))
def test_a_replica_goes_only_where_the_others_held_every_load_of_the_window(series, target):
    window, now, history = None, 0.0, []
    for seconds, loads in series:
        for _ in range(seconds):
            history.append((now, sufficient(loads, LIMITS)))
            before = target
            target, window = decide(now, target, loads, True, window, LIMITS)
            assert target >= 1
            if target < before:
                recent = [n for when, n in history if when >= now - LIMITS.downscale_delay_s]
                assert now - history[0][0] >= LIMITS.downscale_delay_s
                assert target >= max(recent)
            now += 1.0


def context(loads, target, now, state, low=1, high=8):
    """What Serve passes, for replicas called 0, 1, ..."""
    metrics = {
        name: {
            number: [
                SimpleNamespace(timestamp=0, value=-1),
                SimpleNamespace(timestamp=1, value=getattr(one, name)),
            ]
            for number, one in enumerate(loads)
            if one is not None
        }
        for name in FIELDS
    }
    return SimpleNamespace(
        raw_metrics=metrics,
        running_replicas=list(range(len(loads))),
        target_num_replicas=target,
        current_time=now,
        policy_state=state,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
    )


def policy():
    """As Serve's controller gets it: by value, made with the configuration's arguments."""
    carried = AutoscalingPolicy(policy_function=POLICY).get_policy()
    return cloudpickle.loads(cloudpickle.dumps(carried))(
        queued_tokens_per_replica=1000, kv_usage=0.8, upscale_delay_s=2, downscale_delay_s=5
    )


def test_serve_carries_the_policy_and_its_state():
    scale = policy()
    number, state = scale(context([queue(2500)], 1, 10.0, {}))
    assert number == 1
    number, state = scale(context([queue(2500)], 1, 12.0, state))
    assert number == 3
    for now in range(13, 20):
        number, state = scale(context([IDLE, IDLE, IDLE], 3, float(now), state))
    assert number == 1


def test_the_policy_keeps_to_the_bounds():
    scale = policy()
    number, state = 1, {}
    for now in range(10):
        number, state = scale(context([queue(10**9)] * number, number, float(now), state, high=4))
    assert number == 4
    for now in range(10, 30):
        number, state = scale(context([IDLE] * number, number, float(now), state, low=2))
    assert number == 2


def test_a_replica_that_starts_or_is_silent_keeps_the_number():
    scale, state = policy(), {}
    for now in range(20):
        number, state = scale(context([IDLE, None], 2, float(now), state))
        assert number == 2
        number, state = scale(context([IDLE], 2, float(now), state))  # the second one starts
        assert number == 2


def test_no_metrics_at_all_keep_the_number():
    scale = policy()
    empty = context([], 2, 1.0, {})
    empty.raw_metrics = None
    assert scale(empty)[0] == 2


def test_a_meter_tells_shares_of_the_time_since_its_last_reading():
    now = [0.0]
    meter = Meter(lambda: now[0])
    now[0] = 10.0
    first = meter.read(Load(5, 1, 0.2, 0.25, prefill_seconds=6.0))
    assert first == {"queued_tokens": 5, "queued_prompts": 1, "kv_usage": 0.2, "occupancy": 0.6}
    now[0] = 20.0
    assert meter.read(Load(0, 0, 0.2, 0.25, prefill_seconds=6.0))["occupancy"] == 0.25
    # A step of 15 seconds that has just ended.
    now[0] = 22.0
    assert meter.read(Load(0, 0, 0.2, 0.25, prefill_seconds=21.0))["occupancy"] == 1.0
    assert meter.read(Load(0, 0, 0.3, 0.25, prefill_seconds=21.0))["occupancy"] == 0.3
