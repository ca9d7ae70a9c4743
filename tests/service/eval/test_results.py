"""Statistics are paired and by document; files go on where they stopped; tables are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from service.errors import ConfigError
from service.eval.cell import Cell
from service.eval.chance import majority_chance
from service.eval.plot import check_plot, draw, expectation, family, plain_keys
from service.eval.policies import parse_policy
from service.eval.record import Calibration, DocumentScore, Record, pooled, record_cell, solved
from service.eval.results import Results, table
from service.eval.statistics import differences, interval, ratio
from service.eval.tasks import votes
from service.sparsity import SparsityConfig

ROOT = Path(__file__).resolve().parents[3]


def record(**changes):
    fields = {"task": "needles", "context": 4096, "policy": "dense", "phase": "decode", "n": 9}
    fields |= {"documents": 3, "accuracy": 1.0, "low": 1.0, "high": 1.0, "density": 1.0}
    fields |= {"coverage": 1.0, "true_coverage": None, "coverage_error": None, "fallbacks": 0}
    fields |= {"scores": [[3, 3], [3, 3], [3, 3]]}
    return Record(**(fields | changes))


def score(policy, total, count, **changes):
    exact = np.array([0.2, 0.4, 1.0])
    fields = {"n": count, "density": 0.5, "coverage": 0.5, "fallbacks": 1}
    fields |= {"calibration": Calibration(exact, 3, float(exact.sum()), 0.3, 1)}
    return DocumentScore(policy=policy, total=total, count=count, **(fields | changes))


def test_an_interval_holds_the_mean_and_narrows_with_documents():
    rng = np.random.default_rng(1)
    few, many = ([[int(x), 5] for x in rng.integers(0, 6, n)] for n in (10, 400))
    for scores in (few, many):
        low, high = interval(scores)
        assert 0 <= low <= ratio(scores) <= high <= 1
    assert np.subtract(*interval(many)) > np.subtract(*interval(few))
    assert interval([[1, 1], [2, 2]]) == (1.0, 1.0)


def test_documents_are_drawn_within_their_cells():
    # One cell always wins, the other never does: only drawing across cells would vary.
    assert interval([[4, 4]] * 6, [[0, 4]] * 6) == (0.5, 0.5)
    low, high = interval([[4, 4]] * 3 + [[0, 4]] * 3, [[0, 4]] * 6)
    assert low < 0.25 < high <= 0.5


def test_paired_differences_are_narrower_than_their_parts():
    rng = np.random.default_rng(0)
    dense = [[int(x), 16] for x in rng.integers(4, 17, 50)]
    other = [[total - 1, count] for total, count in dense]
    lost = differences(dense, other)
    assert ratio(lost) == pytest.approx(1 / 16)
    assert interval(lost) == pytest.approx((1 / 16, 1 / 16))
    with pytest.raises(ValueError, match="same documents"):
        differences(dense, other[1:])


def test_a_cell_is_recorded_against_dense_wherever_dense_stands():
    documents = [
        [score("dynamic", 2, 4, coverage=None), score("dense", 4, 4)],
        [score("dynamic", 8, 8, density=0.2), score("dense", 8, 8)],
    ]
    sparse, dense = record_cell("needles", 4096, documents, passages=False)
    assert (sparse.n, sparse.documents, sparse.fallbacks) == (12, 2, 2)
    assert sparse.accuracy == pytest.approx(10 / 12)
    assert sparse.loss == pytest.approx(2 / 12)
    assert (sparse.loss_low, sparse.loss_high) == (0.0, 0.5)
    assert sparse.density == pytest.approx((0.5 * 4 + 0.2 * 8) / 12)
    assert sparse.coverage == 0.5
    assert sparse.true_coverage == pytest.approx(1.6 / 3)
    assert sparse.coverage_error == pytest.approx(0.1)
    assert sparse.constant_error == pytest.approx((0.2 + 0.0 + 0.6) / 3)
    assert sparse.overestimates == pytest.approx(1 / 3)
    assert sparse.scores == [[2, 4], [8, 8]] and sparse.bits_per_byte is None
    assert dense.loss is dense.loss_low is dense.loss_high is None


def test_a_passage_is_recorded_in_bits():
    documents = [[score("dense", 90.0, 100, n=30), score("dynamic", 120.0, 100, n=30)]] * 3
    dense, sparse = record_cell("text", 4096, documents, passages=True)
    assert dense.accuracy is sparse.accuracy is None
    assert (sparse.bits_per_byte, sparse.n) == (1.2, 90)
    assert sparse.loss == pytest.approx(0.3)
    assert not pooled([dense, sparse])


def test_every_answer_counts_the_same_over_the_tasks_that_dense_solves():
    lost = {"policy": "dynamic", "density": 0.1, "loss": 0.0}
    records = [
        record(),
        record(**lost, scores=[[3, 3], [3, 3], [0, 3]], accuracy=6 / 9),
        record(task="multi-key", n=30, scores=[[10, 10]] * 3),
        record(**lost | {"density": 0.2}, task="multi-key", n=30, scores=[[10, 10]] * 3),
        record(task="hard", accuracy=0.3, scores=[[1, 3]] * 3),
        record(**lost, task="hard", accuracy=0.0, scores=[[0, 3]] * 3),
        record(**lost, context=8192),  # without dense
        record(policy="dynamic:k=9", documents=1, scores=[[0, 3]]),  # not of the same documents
        record(context=2048, scores=()),  # from an older file
        record(**lost, context=2048, scores=()),
    ]
    [row] = pooled(records)
    assert (row.context, row.policy, row.tasks) == (4096, "dynamic", ("needles", "multi-key"))
    assert (row.n, row.documents, row.dense) == (39, 6, 1.0)
    assert row.loss == pytest.approx(3 / 39) and row.accuracy == pytest.approx(36 / 39)
    assert row.loss_low == 0.0 and row.loss < row.loss_high <= 9 / 39
    assert row.density == pytest.approx((0.1 * 9 + 0.2 * 30) / 39)
    assert ("hard", 4096) not in solved(records)


def test_continuations_are_no_questions_and_do_not_count_among_them():
    lost = {"policy": "dynamic", "density": 0.1}
    for leaking in (0, 3):
        free = [
            record(task="free-text", accuracy=leaking / 3, scores=[[leaking, 3]] * 3),
            record(**lost, task="free-text", loss=leaking / 3, accuracy=0.0, scores=[[0, 3]] * 3),
        ]
        asked = [record(), record(**lost, loss=0.0)]
        assert pooled([*asked, *free]) == pooled(asked) != []
        assert not pooled(free)
        # Dense has nothing to solve there: whatever it leaks, its row stands in the table.
        assert ("free-text", 4096) in solved(free)
        assert "cannot be judged" not in table(free)
    assert asked[0].asked and not free[0].asked
    assert not record(task="text", accuracy=None, bits_per_byte=1.5).asked


def cell(*policies, context=4096, documents=3):
    named = tuple(parse_policy(policy, SparsityConfig()) for policy in policies)
    return Cell("needles", context, documents, named, own_text=False)


def test_parts_of_a_cell_stand_side_by_side():
    results = Results("saccade eval", {}, "abc", "cpu")
    few = record(policy="dynamic:k=64", documents=1, scores=[[2, 3]])
    results.add([few])
    assert results.has(cell("dynamic:k=64", documents=1))
    assert not results.has(cell("dense", "dynamic:k=64", documents=1))
    results.add([record(), record(policy="dynamic", loss=0.1)])
    assert {r.policy for r in results.records} == {"dense", "dynamic", "dynamic:k=64"}
    assert [row.policy for row in pooled(results.records)] == ["dynamic"]
    # Dense anew, of more documents: what was paired with the old one is gone.
    results.add([record(documents=4, scores=[[3, 3]] * 4)])
    assert {r.policy for r in results.records} == {"dense", "dynamic:k=64"}


def test_an_evaluation_goes_on_where_its_file_stops(tmp_path):
    file, settings = tmp_path / "out" / "q.json", {"seed": 1}
    first = Results.start(file, "saccade eval", settings, "abc", "cpu")
    first.add([record(), record(policy="dynamic", loss=0.0)])
    first.save(file)
    envelope = json.loads(file.read_text())
    assert {"command", "commit", "date", "machine", "versions", "records"} <= set(envelope)
    assert envelope["pooled"][0]["loss"] == 0.0
    again = Results.start(file, "saccade eval", settings, "abc", "cpu")
    assert again.records == first.records
    assert again.has(cell("dense", "dynamic"))
    assert not again.has(cell("dense", "fixed"))
    assert not again.has(cell("dense", context=8192))
    assert not again.has(cell("dense", documents=4))
    with pytest.raises(ConfigError, match="other settings"):
        Results.start(file, "saccade eval", {"seed": 2}, "abc", "cpu")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no evaluation"):
        Results.start(file, "saccade eval", settings, "abc", "cpu")


def test_the_order_of_the_records_is_not_that_of_their_coming(tmp_path):
    cells = [[record(context=c, task=t)] for c in (4096, 8192) for t in ("needles", "text")]
    files = []
    for order in (cells, cells[::-1]):
        results = Results("saccade eval", {}, "abc", "cpu")
        for cell in order:
            results.add(cell)
        results.save(tmp_path / "q.json")
        files.append((tmp_path / "q.json").read_text())
    assert files[0] == files[1]
    assert [r["context"] for r in json.loads(files[0])["records"]] == [4096, 4096, 8192, 8192]


def test_records_of_older_files_have_no_scores_and_are_measured_again():
    results = Results("saccade eval", {}, "abc", "cpu", [record(scores=())])
    assert not results.has(cell("dense"))


def test_what_dense_cannot_answer_stands_apart():
    lines = table(
        [
            record(task="hard", accuracy=0.3),
            record(task="hard", policy="dynamic", accuracy=0.2),
            record(),
            record(policy="dynamic", accuracy=0.9, loss=0.1),
            record(task="text", accuracy=None, bits_per_byte=1.5),
        ]
    ).splitlines()
    firsts = [line.split()[0] for line in lines]
    assert firsts == [
        *("task", "needles", "needles"),
        *("task", "text"),
        *("Over", "context", "4096"),
        *("Under", "hard"),
    ]
    assert "cannot be judged" in lines[-2]


@pytest.mark.parametrize(("count", "winner"), [(7, 4), (8, 5), (9, 9), (2, 1)])
def test_a_sample_of_votes_shows_the_majority_as_often_as_counting_says(count, winner):
    ballots = [1] * winner + [-1] * (count - winner)
    for seen in range(count + 1):
        leads = [sum(some) for some in combinations(ballots, seen)]
        right = sum(lead > 0 for lead in leads) + sum(lead == 0 for lead in leads) / 2
        assert majority_chance(count, winner, seen) == pytest.approx(right / len(leads))


def test_the_expected_line_begins_by_guessing_and_ends_by_knowing():
    keys, chance = expectation(32_768)
    assert chance[0] == 0.5 and chance[-1] == 1.0
    assert np.all(np.diff(chance) >= -1e-12)
    assert keys[0] == 111.5 and keys[-1] == 111.5 + votes(32_768 - 80)


def test_policies_of_a_kind_share_a_line():
    names = ["dense", "dynamic", "dynamic:coverage=0.9", "dynamic:k=512", "fixed:sinks:16"]
    assert list(map(family, names)) == ["dense", "dynamic", "dynamic", "dynamic:k", "fixed"]
    assert family("dynamic:k=512,min_coverage=0.9") == "escalating"
    assert family("dynamic:k=512,sampled=false") == "top-k"
    assert plain_keys("dynamic:k=512,sampled=false,dense_layers=1") == 512
    others = (
        "dynamic:k=512",
        "dynamic:k=512,sampled=false,dense_layers=0",
        "dynamic:k=512,min_coverage=0.9",
    )
    assert not any(map(plain_keys, others))


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_drawn_and_drawn_alike_again(tmp_path, suffix):
    records = [
        *(record(task="majority", policy=f"dynamic:k={k}", density=k / 4096) for k in (256, 512)),
        *(
            record(task="majority", policy=f"dynamic:k={k},sampled=false,dense_layers=1")
            for k in (160, 256)
        ),
        record(task="majority", accuracy=0.9, low=0.91),  # an interval beside its mean
        record(task="text", accuracy=None, bits_per_byte=1.5, low=1.4, high=1.6),
    ]
    files = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for file in files:
        check_plot(file)
        draw(records, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    if suffix == ".svg":
        ElementTree.parse(files[0])
    draw([], files[0])
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        check_plot(tmp_path / "plot.pdf")


def test_serving_does_not_load_the_plotting():
    code = "import service.commands.app, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
