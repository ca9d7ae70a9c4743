"""The page of all replicas: what they leave in the ledger, its sums, and who answers with them."""

from __future__ import annotations

import asyncio
import math
import random
import time
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from ray.serve._private.common import ReplicaState
from ray.serve.schema import ApplicationStatus

from service.engine.types import Health
from service.metrics import Metrics
from service.metrics_ledger import Ledger
from service.metrics_reporter import FORGOTTEN, Reporter
from service.metrics_snapshot import STALE, Condition, Snapshot, families_of
from service.metrics_totals import absorbed, render, summed, totals
from service.monitor import Observer, create_monitor_app, health, metrics
from service.serve_state import wanted_replicas, why_none

ALIVE = Health(True, 0.1)


class MemoryStore:
    """The key-value store, without a cluster."""

    def __init__(self):
        self.values = {}
        self.fails = False

    def get(self, key):
        self._check()
        return self.values.get(key)

    def put(self, key, value, *, overwrite=True):
        self._check()
        new = key not in self.values
        if new or overwrite:
            self.values[key] = value
        return new

    def delete(self, key):
        self._check()
        self.values.pop(key, None)

    def keys(self, prefix):
        self._check()
        return [key for key in self.values if key.startswith(prefix)]

    def _check(self):
        if self.fails:
            raise RuntimeError("GCS is away")


class Clock:
    now = 1e9

    def __call__(self):
        return self.now


class Cluster:
    """Replicas over one store; nothing runs by itself."""

    def __init__(self):
        self.store, self.clock = MemoryStore(), Clock()
        self.ledger = Ledger(self.store)
        self.reporters = []

    def replica(self, model="tiny", health=lambda: ALIVE):
        """A reporter that has reported and waits, and its metrics."""
        replica, name = Metrics(model), f"r{len(self.reporters) + 1}"
        reporter = Reporter(self.ledger, name, replica, health, self.clock, interval=3600)
        self.reporters.append(reporter)
        reporter.start()
        return SimpleNamespace(metrics=replica, reporter=reporter)

    def series(self):
        """Values by name and labels."""
        return {
            series: value
            for family in totals(self.ledger.read(), self.clock())
            for series, value in family.samples.items()
        }

    def value(self, name, **labels):
        """The sum over all series of that name with these labels."""
        return sum(
            value
            for (sample, found), value in self.series().items()
            if sample == f"saccade_{name}" and labels.items() <= dict(found).items()
        )


@pytest.fixture
def cluster():
    made = Cluster()
    yield made
    made.store.fails = False
    for reporter in made.reporters:
        reporter.stop()


def serve(replica, requests):
    for _ in range(requests):
        replica.metrics.finished("stop", e2e=0.1, queue=0.0, prefill=0.7, decode=0.3)
        replica.metrics.generation_tokens(5)


# -- snapshots ----------------------------------------------------------------------------------


def test_a_snapshot_is_read_as_it_was_written():
    one = Metrics('a "model"\n')
    one.finished("stop", e2e=0.1, queue=math.pi, prefill=1e-9, decode=1e9)
    one.set_load(1, 2, 1 / 3)
    snapshot = Snapshot(
        families_of(one.registry), Condition(False, True, "why", 0.5), 1e9 + 0.25, True, ("a", "b")
    )
    assert Snapshot.decode(snapshot.encode()) == snapshot
    assert len(snapshot.encode()) < 10_000


def test_the_page_of_one_replica_is_its_own_page_with_its_name_on_the_gauges(cluster):
    replica = cluster.replica()
    serve(replica, 3)
    replica.metrics.set_load(1, 2, 0.5)
    replica.reporter.report()

    def read(page, drop=()):
        return {
            (sample.name, *sorted((k, v) for k, v in sample.labels.items() if k not in drop)): (
                family.type,
                family.documentation,
                sample.value,
            )
            for family in text_string_to_metric_families(page.decode())
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    page = render(totals(cluster.ledger.read(), cluster.clock()))
    assert read(page, drop=("replica",)) == read(replica.metrics.render())
    assert b'saccade_kv_cache_usage_perc{model_name="tiny",replica="r1"} 0.5' in page
    assert b'saccade_replicas{model_name="tiny"} 1.0' in page


# -- totals -------------------------------------------------------------------------------------


def test_totals_are_sums_and_gauges_are_those_of_the_live(cluster):
    one, other = cluster.replica(), cluster.replica()
    serve(one, 7)
    serve(other, 11)
    one.metrics.set_load(2, 0, 0.25)
    other.metrics.set_load(3, 1, 0.75)
    for replica in (one, other):
        replica.reporter.report()
    assert cluster.value("request_success_total", finished_reason="stop") == 18
    assert cluster.value("generation_tokens_total") == 90
    assert cluster.value("e2e_request_latency_seconds_count") == 18
    assert cluster.value("request_prefill_time_seconds_bucket", le="0.5") == 0
    assert cluster.value("request_prefill_time_seconds_bucket", le="0.8") == 18
    assert cluster.value("kv_cache_usage_perc", replica="r1") == 0.25
    assert cluster.value("kv_cache_usage_perc", replica="r2") == 0.75
    assert cluster.value("num_requests_running") == 5
    assert cluster.value("replicas") == 2

    # Killed: its last report stands, its gauges go.
    cluster.clock.now += STALE + 1
    one.reporter.report()
    assert cluster.value("request_success_total") == 18
    assert cluster.value("num_requests_running") == 2
    assert cluster.value("replicas") == 1

    # Stopped: what came behind the last report is not lost.
    serve(one, 2)
    one.reporter.stop()
    assert cluster.value("request_success_total") == 20
    assert ("saccade_replicas", (("model_name", "tiny"),)) in cluster.series()
    assert cluster.value("replicas") == 0
    assert cluster.value("num_requests_running") == 0


def test_an_engine_that_is_dead_is_no_live_replica(cluster):
    state = ALIVE
    replica = cluster.replica(health=lambda: state)
    assert cluster.value("replicas") == 1
    state = Health(False, 200.0, False, "no step for 200 seconds")
    replica.reporter.report()
    assert cluster.value("replicas") == 0


def test_what_replaces_parts_of_a_sum_is_never_less():
    family = families_of(Metrics("m").registry)[0]
    (series,) = family.samples
    draw = random.Random(0)
    for _ in range(200):
        values = [draw.random() * 10.0 ** draw.randint(-6, 9) for _ in range(draw.randint(1, 9))]
        parts = [[family._replace(samples={series: value})] for value in values]
        whole = summed(parts)[family.name].samples[series]
        kept = draw.randint(0, len(parts) - 1)
        replaced = [[absorbed(parts[kept:])[family.name]], *parts[:kept]]
        after = summed(replaced)[family.name].samples[series]
        assert whole <= after <= whole * (1 + 1e-15)


def test_no_series_ever_goes_backwards(cluster):
    """Whatever replicas do: count, stop, are killed, start and inherit."""
    draw = random.Random(1)
    running, requests, before = [], 0, {}
    for _ in range(60):
        choice = draw.random()
        if choice < 0.2 or not running:
            running.append(cluster.replica())
        elif choice < 0.3:
            running.pop(draw.randrange(len(running))).reporter.stop()
        elif choice < 0.4:
            killed = running.pop(draw.randrange(len(running)))
            killed.reporter.report()  # so that the test knows what is lost: nothing
        else:
            replica = draw.choice(running)
            seconds = draw.random()
            replica.metrics.finished("stop", e2e=seconds, queue=0.1, prefill=0.2, decode=seconds)
            requests += 1
            replica.reporter.report()
        cluster.clock.now += draw.choice([1, 1, 20, FORGOTTEN / 4])
        for replica in running:
            replica.reporter.report()
        after = {
            series: value
            for family in totals(cluster.ledger.read(), cluster.clock())
            if family.kind != "gauge"
            for series, value in family.samples.items()
        }
        assert all(after[series] >= value for series, value in before.items())
        assert cluster.value("request_success_total") == requests
        before = after
    assert len(cluster.reporters) > 10
    assert len(cluster.store.values) < 15


# -- inheriting ---------------------------------------------------------------------------------


def ended(cluster, requests):
    replica = cluster.replica()
    serve(replica, requests)
    replica.reporter.stop()


def test_a_replica_takes_over_what_ended_ones_counted(cluster):
    for _ in range(5):
        ended(cluster, 2)
    heir = cluster.replica()
    assert len(cluster.ledger.read()) == 1
    serve(heir, 1)
    heir.reporter.report()
    assert cluster.value("request_success_total") == 11
    heir.reporter.stop()
    cluster.replica()
    assert cluster.value("request_success_total") == 11
    assert set(cluster.store.values) == {"snapshot-1:r7"}


def test_two_that_start_at_once_inherit_once(cluster):
    ended(cluster, 4)
    put = cluster.store.put
    second = []

    def interrupted(key, value, *, overwrite=True):
        if key.startswith("snapshot-1:r2") and not second:
            second.append(cluster.replica())  # all of its start, while the first has claimed
        return put(key, value, overwrite=overwrite)

    cluster.store.put = interrupted
    cluster.replica()
    assert second
    assert cluster.value("request_success_total") == 4


def test_one_that_comes_late_to_an_inheritance_inherits_nothing(cluster):
    ended(cluster, 4)
    read = cluster.ledger.read
    found = read()
    cluster.replica()
    cluster.ledger.read = lambda: found  # what the second saw before the first was done
    cluster.replica()
    cluster.ledger.read = read
    assert cluster.value("request_success_total") == 4


@pytest.mark.parametrize("when", ["claimed", "reported"])
def test_an_heir_that_dies_in_between_loses_and_doubles_nothing(cluster, when):
    ended(cluster, 4)
    broken = "put" if when == "claimed" else "delete"
    method = getattr(cluster.store, broken)

    def fails(key, *rest, **options):
        if not key.startswith("claim:"):
            raise SystemExit
        return method(key, *rest, **options)

    setattr(cluster.store, broken, fails)
    with pytest.raises(SystemExit):
        cluster.replica()
    setattr(cluster.store, broken, method)
    assert cluster.value("request_success_total") == 4
    cluster.clock.now += FORGOTTEN + 1
    cluster.replica()
    cluster.clock.now += FORGOTTEN + 1
    cluster.replica()
    assert cluster.value("request_success_total") == 4


def test_a_reader_sees_the_heir_of_what_goes_while_it_reads(cluster):
    ended(cluster, 4)
    keys = cluster.store.keys
    later = []

    def listed(prefix):
        found = keys(prefix)
        if not later:
            later.append(None)
            cluster.replica()
        return found

    cluster.store.keys = listed
    assert cluster.value("request_success_total") == 4


# -- the reports' thread ------------------------------------------------------------------------


def test_reports_go_on_when_the_store_was_away():
    store, replica = MemoryStore(), Metrics("tiny")
    reporter = Reporter(Ledger(store), "r", replica, lambda: ALIVE, interval=0.01)
    reporter.start()

    def reported():
        return summed(one.families for one in Ledger(store).read().values())[
            "saccade_prompt_tokens"
        ].samples["saccade_prompt_tokens_total", (("model_name", "tiny"),)]

    store.fails = True
    replica.prompt_tokens(5)
    time.sleep(0.05)
    store.fails = False
    deadline = time.monotonic() + 10
    while reported() != 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    replica.prompt_tokens(1)
    reporter.stop()
    assert reported() == 6
    assert not reporter._thread.is_alive()


# -- the applications ---------------------------------------------------------------------------


NO_KEY = SimpleNamespace(api_key=None, metrics_need_key=False)


def observer_of(cluster, wanted=lambda: 2, why_none=lambda: None):
    return Observer(cluster.ledger, wanted, why_none, cluster.clock)


def get(app, path, method="GET", root_path="", **options):
    async def send():
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.mark.parametrize("root_path", ["", "/metrics"])
def test_metrics_answer_at_their_path_alone(cluster, root_path):
    app = create_monitor_app("/metrics", metrics, observer_of(cluster), NO_KEY)
    replica = cluster.replica()
    serve(replica, 3)
    replica.reporter.report()
    for path in ("/metrics", "/metrics/"):
        page = get(app, path, root_path=root_path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/plain")
        assert "saccade_e2e_request_latency_seconds_count" in page.text
        assert "\nsaccade_replicas_wanted 2.0\n" in page.text
    below = get(app, "/metrics/x", root_path=root_path)
    assert (below.status_code, below.json()["error"]["type"]) == (404, "invalid_request_error")
    assert get(app, "/metrics", "POST", root_path).status_code == 405


def test_before_the_first_replica_the_page_says_none(cluster):
    app = create_monitor_app("/metrics", metrics, observer_of(cluster, lambda: None), NO_KEY)
    assert get(app, "/metrics").text.splitlines()[-1] == "saccade_replicas 0.0"


def test_metrics_ask_for_the_key_where_they_are_told_to(cluster):
    keys = SimpleNamespace(api_key=SecretStr("k"), metrics_need_key=True)
    app = create_monitor_app("/metrics", metrics, observer_of(cluster), keys)
    assert get(app, "/metrics").status_code == 401
    known = {"Authorization": "Bearer k"}
    assert get(app, "/metrics", headers=known).status_code == 200
    app = create_monitor_app("/health", health, observer_of(cluster), keys)
    assert get(app, "/health").status_code == 503  # open, and nobody is there


def test_health_is_that_of_the_best_and_says_why_there_is_none(cluster):
    said = []
    app = create_monitor_app(
        "/health", health, observer_of(cluster, why_none=lambda: said and said[0]), NO_KEY
    )

    def reason():
        answer = get(app, "/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        return answer.json()["error"]["message"]

    assert reason() == "no replica is alive; the first one may be starting"
    state = ALIVE
    one, other = cluster.replica(health=lambda: state), cluster.replica()
    told = get(app, "/health").json()
    assert (told["status"], told["replicas"], told["reason"]) == ("ok", 2, None)
    state = Health(True, 0.2, True, "a kernel failed")
    one.reporter.report()
    told = get(app, "/health").json()
    assert (told["status"], told["replicas"]) == ("degraded", 2)
    assert told["reason"] == "a kernel failed"
    state = Health(False, 0.2, False, "no step for 200 seconds")
    one.reporter.report()
    assert get(app, "/health").json()["replicas"] == 1
    cluster.clock.now += STALE
    one.reporter.report()
    assert reason() == "no replica is alive: no step for 200 seconds"
    cluster.clock.now += STALE
    assert reason() == "no replica is alive: no step for 200 seconds"
    said.append("Ray Serve says deploying (1 starting)")
    assert reason() == "no replica is alive: Ray Serve says deploying (1 starting)"
    other.reporter.report()
    assert get(app, "/health").status_code == 200


def test_a_replica_that_vanished_is_told_by_its_silence(cluster):
    app = create_monitor_app("/health", health, observer_of(cluster), NO_KEY)
    cluster.replica()
    cluster.clock.now += 30
    told = get(app, "/health").json()["error"]["message"]
    assert told == "no replica is alive; the last report came 30 seconds ago"


def deployed(monkeypatch, message="", status="RUNNING", **states):
    """Make Serve say so of the application `saccade`."""
    deployment = SimpleNamespace(
        message=message, replica_states={ReplicaState[name]: n for name, n in states.items()}
    )
    application = SimpleNamespace(
        status=ApplicationStatus[status], deployments={"saccade": deployment}
    )
    told = SimpleNamespace(applications={"saccade": application})
    monkeypatch.setattr("service.serve_state.serve.status", lambda: told)


def test_what_serves_controller_says_is_put_in_few_words(monkeypatch):
    deployed(monkeypatch, RUNNING=1, STARTING=2, STOPPING=4)
    assert wanted_replicas("saccade") == 3
    assert why_none("saccade") is None
    assert wanted_replicas("other") is None
    assert why_none("other") == "the application other is not deployed"
    deployed(monkeypatch, status="DEPLOYING", STARTING=2)
    assert why_none("saccade") == "Ray Serve says deploying (2 starting)"
    deployed(monkeypatch, "no node has room\nfor it", status="DEPLOYING", STARTING=1)
    assert why_none("saccade") == "Ray Serve says deploying (1 starting): no node has room"
    deployed(monkeypatch, status="UNHEALTHY")
    assert why_none("saccade") == "Ray Serve says unhealthy (no replicas)"
    traceback = "Traceback ...\n  raise\nmodels.errors.CheckpointError: config.json is damaged\n"
    deployed(monkeypatch, traceback, status="DEPLOY_FAILED")
    assert why_none("saccade") == "config.json is damaged"


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
def test_without_the_ledger_the_last_reading_stands(cluster, monkeypatch, trouble):
    monkeypatch.setattr("service.monitor.PATIENCE", 0.05)
    waits = []

    def wanted():
        if waits:
            time.sleep(0.2)
        return 2

    observer = observer_of(cluster, wanted)
    app = create_monitor_app("/metrics", metrics, observer, NO_KEY)
    state = create_monitor_app("/health", health, observer, NO_KEY)
    if trouble == "fails":
        cluster.store.fails = True
        assert get(app, "/metrics").status_code == 503
        cluster.store.fails = False
    cluster.replica()
    page = get(app, "/metrics").text
    if trouble == "fails":
        cluster.store.fails = True
    else:
        waits.append(None)
        read = cluster.ledger.read
        cluster.ledger.read = lambda: time.sleep(0.2) or read()
    cluster.clock.now += 100
    assert get(app, "/metrics").text == page
    assert get(state, "/health").json()["status"] == "ok"
