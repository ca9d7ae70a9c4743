"""A selection's fingerprint is another wherever anything that decides the selection is."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from kernels import budget, codes, fingerprint, masses, sample
from kernels.gpu import lanes
from kernels.policy import Dynamic

OTHER = {
    "coverage": 0.5,
    "min_keys": 100,
    "max_keys": 4096,
    "worth": 3.0,
    "sinks": 4,
    "sampled": False,
}
CONSTANTS = [
    *((codes, name) for name in ("NOISE", "WORD", "FOURS", "SEED")),
    (masses, "MOST"),
    *((budget, name) for name in ("SAMPLE", "PROBE", "APART", "FAR")),
    *((sample, name) for name in ("SEGMENT", "BITS", "STEP", "TURN", "STRIDE")),
    (lanes, "PLANES"),
    (fingerprint, "SURVIVORS"),
]


def digest(*arguments):
    return fingerprint.fingerprint(*arguments)["digest"]


def test_it_is_the_same_each_time_and_can_be_written():
    found = fingerprint.fingerprint(Dynamic(), 1)
    assert found == fingerprint.fingerprint(Dynamic(), 1)
    assert json.loads(json.dumps(found)) == found
    assert len(found["digest"]) == fingerprint.DIGITS and int(found["digest"], 16) >= 0
    assert found["policy"]["coverage"] == Dynamic().coverage
    assert found["scorer"]["lanes"]["PLANES"] == lanes.PLANES.value
    assert (found["dense_layers"], found["survivors"]) == (1, 1.0)


def test_every_field_of_the_policy_counts():
    assert set(OTHER) == {field.name for field in fields(Dynamic)}
    digests = {digest(replace(Dynamic(), **{name: value})) for name, value in OTHER.items()}
    assert len(digests | {digest(Dynamic()), digest(Dynamic(), 2)}) == len(OTHER) + 2


@pytest.mark.parametrize(("module", "name"), CONSTANTS, ids=lambda x: getattr(x, "__name__", x))
def test_every_constant_of_the_scorer_counts(module, name, monkeypatch):
    before = digest(Dynamic())
    value = getattr(module, name)
    monkeypatch.setattr(module, name, getattr(value, "value", value) + 1)
    assert digest(Dynamic()) != before


def test_without_triton_queries_have_no_planes(monkeypatch):
    monkeypatch.setattr(fingerprint, "find_spec", lambda name: None)
    assert "lanes" not in fingerprint.fingerprint(Dynamic())["scorer"]
