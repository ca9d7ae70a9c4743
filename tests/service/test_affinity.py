"""Where requests of a session go."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from service.affinity import AffinityRouter, place, ranked

REPLICAS = ["a1", "b2", "c3", "d4"]
SESSIONS = [f"session {number}" for number in range(2000)]


def idle(_):
    return 0


def home(session, replicas, load=idle, limit=4):
    return replicas[place(session, replicas, load, limit)[0][0]]


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
        assert place("s", REPLICAS, loads.get, 4)[0] == [following]
    loads[order[-1]] = 5
    loads[order[2]] = 3
    assert place("s", REPLICAS, loads.get, 3)[0] == [order[2]]


def test_where_all_are_busy_the_least_loaded_takes_it():
    loads = [9, 7, 8, 10]
    assert place("s", REPLICAS, loads.__getitem__, 4)[0] == [1]
    order = ranked("s", REPLICAS)
    assert place("s", REPLICAS, lambda _: 5, 4)[0] == [order[0]]


def test_every_replica_is_in_some_rank_once():
    for session in ("", "s"):
        for load in (idle, lambda _: 9):
            for replicas in (REPLICAS, ["one"], []):
                tried = [one for rank in place(session, replicas, load, 4) for one in rank]
                assert sorted(tried) == list(range(len(replicas)))


def test_without_a_session_two_are_chosen_at_random():
    seen = {frozenset(place("", REPLICAS, idle, 4)[0]) for _ in range(200)}
    assert len(seen) == 6


@pytest.mark.parametrize("limit", [2, 50])
def test_the_router_asks_serves_counts_and_reads_the_session(limit):
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in REPLICAS]
    counts = {replica.replica_id.unique_id: 10 for replica in replicas}
    order = ranked("s", REPLICAS)
    counts[REPLICAS[order[3]]] = None  # not known: Serve asks it
    router = SimpleNamespace(
        replica_queue_len_cache=SimpleNamespace(get=lambda one: counts[one.unique_id])
    )
    AffinityRouter.initialize_state(router, limit=limit)
    request = SimpleNamespace(metadata=SimpleNamespace(session_id="s"))
    ranks = asyncio.run(AffinityRouter.choose_replicas(router, replicas, request))
    assert ranks[0] == [replicas[order[3 if limit == 2 else 0]]]
    assert sum(map(len, ranks)) == 4
    nobody = asyncio.run(AffinityRouter.choose_replicas(router, replicas, None))
    assert sum(map(len, nobody)) == 4
    assert asyncio.run(AffinityRouter.choose_replicas(router, [], request)) == []
