"""Results of speed and of quality say what selected the keys, and speak of the same selection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.fingerprint import fingerprint
from service.bench import decode, engine
from service.errors import ConfigError
from service.eval.policies import parse_policy, selections_of
from service.eval.results import Results
from service.sparsity import SparsityConfig

RESULTS = Path(__file__).resolve().parents[1] / "bench/results"
SPEED = ("decode-h200", "engine-h200")


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def named(*texts):
    return selections_of(parse_policy(text, SparsityConfig()) for text in texts)


def test_speed_is_measured_of_a_policy_that_quality_is_measured_of():
    (quality,) = named("dynamic:k=2048").values()
    assert decode.Options(2048, 1, None).selection() == quality
    assert engine.Options(2048, 1, 1, None).selection() == quality
    assert engine.Options(1024, 1, 1, None).selection() != quality


def test_policies_that_select_by_content_have_fingerprints():
    dense_first = "dynamic:k=64,dense_layers=1"
    found = named("dense", "fixed:window:64", "dynamic", "dynamic:k=64", dense_first)
    assert set(found) == {"dynamic", "dynamic:k=64", dense_first}
    assert found[dense_first]["dense_layers"] == 1
    assert len({one["digest"] for one in found.values()}) == 3


def test_an_evaluation_goes_on_only_with_the_same_selection(tmp_path):
    file, before = tmp_path / "quality.json", named("dynamic:k=64")
    start = ("saccade eval", {"seed": 1}, "abc", "cpu")
    Results.start(file, *start, before).save(file)
    assert json.loads(file.read_text())["settings"]["selections"] == before

    again = Results.start(file, *start, named("dynamic:k=32"))
    assert set(again.selections) == {"dynamic:k=64", "dynamic:k=32"}

    changed = fingerprint(decode.Options(65, 1, None).policy)
    with pytest.raises(ConfigError, match="other settings"):
        Results.start(file, *start, {"dynamic:k=64": changed})


def test_a_file_that_does_not_say_what_selected_is_not_gone_on_with(tmp_path):
    file, start = tmp_path / "quality.json", ("saccade eval", {"seed": 1}, "abc", "cpu")
    Results.start(file, *start).save(file)
    saved = json.loads(file.read_text())
    del saved["settings"]["selections"]
    file.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="holds no evaluation"):
        Results.start(file, *start, named("dynamic"))


@pytest.mark.parametrize("name", SPEED)
def test_the_results_at_hand_are_of_one_selection(name):
    speed, quality = load(name), load("quality")
    measured = {record["policy"] for record in quality["records"]}
    selection = speed["settings"]["selection"]
    alike = {p for p, one in quality["settings"]["selections"].items() if one == selection}
    assert alike & measured, f"no policy of quality.json selects as {name}.json says it does"
