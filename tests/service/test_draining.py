"""When a replica that Serve stops ends what still runs."""

from __future__ import annotations

import threading
import time

from service import draining
from service.draining import MARGIN, Drain


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def watching(monkeypatch, stopping, patience=0.05):
    """A watch that is asked every few milliseconds, on a clock of its own."""
    monkeypatch.setattr(draining, "RETRY", 0.005)
    now, ended = [0.0], threading.Event()
    drain = Drain(MARGIN + patience, stopping, ended.set, clock=lambda: now[0])
    drain.start()
    return drain, now, ended


def test_a_replica_that_is_checked_is_not_asked_about(monkeypatch):
    asked = []
    drain, now, ended = watching(monkeypatch, lambda: asked.append(1))
    for _ in range(20):
        now[0] += 0.04
        drain.checked()
        time.sleep(0.01)
    assert not asked
    assert not ended.is_set()
    drain.close()


def test_what_runs_ends_where_checks_are_missing_and_serve_stops_replicas(monkeypatch):
    _, now, ended = watching(monkeypatch, lambda: True)
    time.sleep(0.1)
    assert not ended.is_set()
    now[0] = 0.06
    assert ended.wait(10)


def test_a_controller_that_is_gone_or_stops_nothing_ends_nothing(monkeypatch):
    answers = [ConnectionError(), False, ConnectionError(), True]

    def stopping():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    _, now, ended = watching(monkeypatch, stopping)
    now[0] = 1.0
    assert ended.wait(10)
    assert not answers


def test_a_check_while_serve_is_asked_counts(monkeypatch):
    asked = threading.Event()

    def stopping():
        asked.set()
        drain.checked()
        return True

    drain, now, ended = watching(monkeypatch, stopping)
    now[0] = 1.0
    assert asked.wait(10)
    time.sleep(0.05)
    assert not ended.is_set()
    drain.close()
    wait_for(lambda: not drain._thread.is_alive())
