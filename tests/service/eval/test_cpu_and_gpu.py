"""A CPU and a GPU give the same table of quality: their results, document by document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.eval.record import Record
from service.eval.statistics import differences, interval

RESULTS = Path(__file__).resolve().parents[2] / "bench/results"


def load(name):
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    records = [Record(**record) for record in saved["records"]]
    return saved["settings"], {(r.task, r.context, r.policy): r for r in records}


CPU, GPU = load("quality-cpu"), load("quality")
POLICIES = sorted({policy for _, _, policy in CPU[1]})


def test_both_measure_the_same():
    (mine, cpu), (yours, gpu) = CPU, GPU
    same = ("model", "weights", "dtype", "seed", "questions", "sparsity", "majority")
    assert [mine[name] for name in same] == [yours[name] for name in same]
    assert {r.machine for r in cpu.values()}.isdisjoint(r.machine for r in gpu.values())
    for policy in set(POLICIES) - {"dense"}:
        assert mine["selections"][policy] == yours["selections"][policy]


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_same_within_noise(policy):
    cells = [
        differences(GPU[1][cell].scores[: mine.documents], mine.scores)
        for cell, mine in CPU[1].items()
        if cell[2] == policy
    ]
    low, high = interval(*cells)
    assert low <= 0 <= high


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "dense"])
def test_as_many_keys_are_read_and_estimates_are_as_good(policy):
    for cell, mine in CPU[1].items():
        if cell[2] == policy:
            yours = GPU[1][cell]
            assert mine.density == pytest.approx(yours.density, rel=0.05)
            assert mine.true_coverage == pytest.approx(yours.true_coverage, abs=0.02)
            assert mine.coverage_error == pytest.approx(yours.coverage_error, rel=0.1)
