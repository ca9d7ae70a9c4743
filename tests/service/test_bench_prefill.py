"""`saccade bench prefill` and `saccade bench engine --prompt`, small."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from service import cli
from service.bench import prefill, prompt
from service.bench.decode import Shape
from service.bench.shapes import shape_of

CPU = torch.device("cpu")


def test_every_way_over_a_prompt_is_timed_beside_its_peer():
    options = prefill.Options(share=0.1, repeats=1)
    records = prefill.measure([700], CPU, torch.float32, Shape(4, 2, 32), options)
    by_way = {record.way: record for record in records}
    assert set(by_way) == {"dense", "every page", "share", "share alone", "dynamic", "sdpa"}
    assert by_way["every page"].density == by_way["sdpa"].density == 1.0
    assert by_way["share"].density == by_way["share alone"].density < 0.5
    assert by_way["sdpa"].ratio == 1.0 and by_way["sdpa"].dense_peer == "sdpa"
    assert "share alone" in prefill.table(records)


def test_a_models_prompt_is_timed_densely_and_sparsely():
    dense, dynamic = prompt.measure(shape_of("tiny"), 512, 128, CPU, torch.float32, 1)
    assert (dense.policy, dense.density, dense.ratio) == ("dense", 1.0, 1.0)
    assert dynamic.policy == "dynamic" and 0 < dynamic.density <= 1
    assert dynamic.ratio == pytest.approx(dense.seconds / dynamic.seconds)
    assert dense.floor_s is None


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch):
    file = tmp_path / "prefill.json"
    line = ["bench", "prefill", "--lengths", "256", "--repeats", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["saccade", *line])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    saved = json.loads(file.read_text())
    assert saved["command"].startswith("saccade bench prefill") and len(saved["records"]) == 6
