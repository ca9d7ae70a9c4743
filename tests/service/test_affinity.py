"""Where requests of a session go."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve._private.request_router.common import ReplicaQueueLengthCache
from ray.serve.request_router import ReplicaID

from service.affinity import AffinityRouter, place, ranked

REPLICAS = ["a1", "b2", "c3", "d4"]
SESSIONS = [f"session {number}" for number in range(2000)]


def idle(_):
    return 0


def home(session, replicas, load=idle, limit=4):
    return replicas[place(session, replicas, load, limit)[0]]


def test_a_session_has_one_home_whatever_the_order_of_the_replicas():
    for session in SESSIONS[:100]:
        assert home(session, REPLICAS) == home(session, REPLICAS[::-1])


def test_sessions_spread():
    homes = Counter(home(session, REPLICAS) for session in SESSIONS)
    # Binomial with p = 1/4: 500, standard deviation 19.
    assert all(400 < homes[name] < 600 for name in REPLICAS)


def test_where_a_replica_goes_only_its_sessions_move_and_they_spread():
    left = [name for name in REPLICAS if name != "b2"]
    moved = Counter()
    for session in SESSIONS:
        before, after = home(session, REPLICAS), home(session, left)
        if before == "b2":
            moved[after] += 1
        else:
            assert after == before
    assert all(moved[name] > 100 for name in left)


def test_where_a_replica_comes_sessions_move_only_to_it():
    for session in SESSIONS[:200]:
        before, after = home(session, REPLICAS), home(session, [*REPLICAS, "e5"])
        assert after in (before, "e5")


def test_a_busy_home_passes_a_session_on_to_the_next_in_its_order():
    order = ranked("s", REPLICAS)
    loads = dict.fromkeys(range(4), 0)
    for busy, following in itertools.pairwise(order):
        loads[busy] = 4
        assert place("s", REPLICAS, loads.get, 4)[0] == following
    loads[order[-1]] = 5
    loads[order[2]] = 3
    assert place("s", REPLICAS, loads.get, 3)[0] == order[2]


def test_where_all_are_busy_the_least_loaded_takes_it():
    loads = [9, 7, 8, 10]
    assert place("s", REPLICAS, loads.__getitem__, 4)[0] == 1
    order = ranked("s", REPLICAS)
    assert place("s", REPLICAS, lambda _: 5, 4)[0] == order[0]


def test_every_replica_is_tried_once():
    for session in ("", "s"):
        for load in (idle, lambda _: 9):
            for replicas in (REPLICAS, ["one"], []):
                tried = place(session, replicas, load, 4)
                assert sorted(tried) == list(range(len(replicas)))


def test_without_a_session_the_less_busy_of_two_takes_it():
    loads = [3, 0, 2, 1]
    firsts = Counter(place("", REPLICAS, loads.__getitem__, 4)[0] for _ in range(600))
    # Pairs that it is the less busy of: 0, 3, 1 and 2 of 6.
    assert firsts[0] == 0
    assert 240 < firsts[1] < 360
    assert 50 < firsts[2] < 150
    assert 140 < firsts[3] < 260
    equal = Counter(place("", REPLICAS, idle, 4)[0] for _ in range(600))
    assert min(equal.values()) > 90


@pytest.fixture
def router():
    """A router with four replicas, whose load Serve does not know yet, and its replicas."""
    replicas = [SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("d"))) for name in REPLICAS]
    made = AffinityRouter.__new__(AffinityRouter)
    made._use_replica_queue_len_cache = False
    made._replica_queue_len_cache = ReplicaQueueLengthCache()
    made.initialize_state(limit=2)
    return made, replicas


def choose(router, replicas, session="s"):
    request = SimpleNamespace(metadata=SimpleNamespace(session_id=session))
    return asyncio.run(router.choose_replicas(replicas, request))


def test_the_router_goes_by_what_it_sent_and_by_what_replicas_say(router):
    router, replicas = router
    first, second, third, last = (replicas[index] for index in ranked("s", REPLICAS))
    assert choose(router, replicas) == [[first], [second], [third], [last]]
    for _ in range(2):
        assert choose(router, replicas)[0] == [first]
        router.on_send_request(first.replica_id)
    assert choose(router, replicas)[0] == [second]
    # Requests of other proxies.
    router.replica_queue_len_cache.update(second.replica_id, 5)
    assert choose(router, replicas)[0] == [third]
    # An answer that is older than what has been sent since.
    router.replica_queue_len_cache.update(first.replica_id, 1)
    assert choose(router, replicas)[0] == [third]
    router.on_request_completed(first.replica_id, "1")
    assert choose(router, replicas)[0] == [first]
    for number in range(3):
        router.on_request_completed(first.replica_id, str(number))
    assert not router._sent


def test_the_router_is_asked_without_a_request_and_without_replicas(router):
    router, replicas = router
    assert sum(map(len, asyncio.run(router.choose_replicas(replicas, None)))) == 4
    assert sum(map(len, choose(router, replicas, ""))) == 4
    assert choose(router, []) == []
