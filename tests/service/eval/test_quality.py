"""One command measures every number of the quality section, and another writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.eval import evaluation as evaluation_module
from service.eval.cell import Cell
from service.eval.evaluation import Evaluation
from service.eval.record import Record
from service.eval.results import Results
from service.sparsity import SparsityConfig
from tests.bench import quality
from tests.service.conftest import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ("pydantic_settings", "ray", "fastapi", "uvicorn", "openai", "transformers")
"""What a machine that only measures need not have."""


def test_the_parts_are_what_was_asked_for():
    cells = quality.cells_of(quality.PARTS)
    usual = quality.cells_of([part for part in quality.PARTS if part.name != "prefill"])
    assert len({(c.task, c.context, p.name) for c in usual for p in c.policies}) == sum(
        len(c.policies) for c in usual
    )  # no record is measured twice, but that sparse prompts are beside dense ones of their own
    for one in cells:
        assert isinstance(one, Cell)
        compared = len(one.policies) > 1 and one.policies[0].name == "dense"
        assert not compared or one.documents >= 100
    documents = {(c.task, c.context): c.documents for c in cells if c.policies[0].name == "dense"}
    assert documents["needle", 4096] == 200 and documents["needle", 65_536] == 1000
    assert documents["majority", 32_768] == 250 and documents["variables", 65_536] == 100


def test_the_results_can_be_gone_on_from_elsewhere_and_keep_their_origin(tmp_path):
    before = json.loads(quality.RESULTS.read_text())
    copy = tmp_path / "quality.json"
    copy.write_text(quality.RESULTS.read_text())
    evaluation = Evaluation(quality.MODEL, torch.device("cpu"), quality.QUESTIONS, quality.SEED)
    texts = Path(before["settings"]["text"])
    settings = evaluation.settings(quality.MODEL.name, texts, SparsityConfig())
    # Whatever the device: what it would be dense below plays no part.
    gpu = replace(evaluation, device=torch.device("cuda"))
    assert gpu.settings(quality.MODEL.name, texts, SparsityConfig()) == settings
    assert settings["sparsity"]["dense_below"] == 2048
    results = Results.start(copy, "another command", settings, "abcdef0", "Abacus")
    old = results.records[0]
    results.add([replace(old, policy="dynamic:k=77", loss=None)])
    results.save(copy)
    after = [Record(**record) for record in json.loads(copy.read_text())["records"]]
    origins = [(one["commit"], one["machine"]) for one in before["records"]]
    assert [(r.commit, r.machine) for r in after if r.policy != "dynamic:k=77"] == origins
    assert {(r.commit, r.machine) for r in after if r.policy == "dynamic:k=77"} == {
        ("abcdef0", "Abacus")
    }
    section = quality.section(json.loads(copy.read_text()))
    assert "Abacus, commit abcdef0" in section and before["machine"] in section


def test_a_cell_that_is_named_twice_is_measured_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluation_module, "examine", lambda _s, _d, wanted, *_: iter(seen.append(wanted) or ())
    )
    cell = quality.cells_of(quality.PARTS)[0]
    evaluation = Evaluation(quality.MODEL, torch.device("cpu"), 10, 0)
    evaluation.fill([cell, cell], Results("", {}, "", ""), None)
    assert seen == [[cell]]


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    folder, novels = write_checkpoint(tmp_path / "tiny"), tmp_path / "novels"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    novels.mkdir()
    (novels / "a.txt").write_text(" ".join(f"He counted {i} sheep." for i in range(9000)))
    policies = ("dense", "dynamic:coverage=0.98")
    parts = (
        quality.Part("dense", ("needle",), (2048,), ("dense",), documents=1, answers=0),
        quality.Part("calibration", ("needle",), (2048,), ("dynamic:k=64",), 2, 0),
        quality.Part("text", ("text",), (1024, 2048), policies, 2, own_text=True),
    )
    monkeypatch.setattr(quality, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--measure"])
    output = tmp_path / "quality.json"
    add, fixed = Results.add, []

    def interrupted(self, records):
        add(self, records)
        fixed.append(records)
        if len(fixed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "add", interrupted)
    arguments = ["--measure", "--text-dir", str(novels), "--output", str(output)]
    arguments += ["--model", str(folder), "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments)
    assert len(json.loads(output.read_text())["records"]) == 2
    monkeypatch.setattr(Results, "add", add)
    assert quality.main(arguments) == 0
    saved = json.loads(output.read_text())
    found = {(r["task"], r["context"], r["policy"]): r for r in saved["records"]}
    assert len(found) == len(saved["records"]) == 6
    assert found["needle", 2048, "dense"]["documents"] == 1
    assert found["needle", 2048, "dynamic:k=64"]["documents"] == 2
    assert found["needle", 2048, "dynamic:k=64"]["loss"] is None
    assert found["text", 2048, "dynamic:coverage=0.98"]["loss"] is not None
    assert {"command", "commit", "date", "machine", "versions", "settings", "pooled"} <= set(saved)
    text = quality.section(saved)
    assert "cost" in text and "| `text` | 2,048 |" in text and "`dynamic:k=64`" in text
    # Nothing is left to do.
    monkeypatch.setattr(Results, "add", interrupted)
    assert quality.main(arguments) == 0


def record(task, context, policy, **changes):
    fields = {"n": 20, "documents": 2, "accuracy": 0.9, "low": 0.8, "high": 1.0, "density": 0.02}
    fields |= {"coverage": 0.7, "true_coverage": 0.69, "coverage_error": 0.01, "fallbacks": 3}
    fields |= {"constant_error": 0.2, "overestimates": 0.001, "scores": [[9, 10], [9, 10]]}
    if policy == "dense":
        fields |= {"accuracy": 1.0, "constant_error": None, "scores": [[10, 10], [10, 10]]}
    else:
        fields |= {"loss": 0.1, "loss_low": 0.05, "loss_high": 0.15}
    return Record(task=task, context=context, policy=policy, phase="decode", **(fields | changes))


def test_every_table_says_what_its_records_say():
    single = {"loss": None, "loss_low": None, "loss_high": None}
    records = [
        *(record(task, 4096, "dense") for task in ("needle", "majority")),
        *(
            record(task, context, policy)
            for context in (32_768, 65_536)
            for task in ("needle", "needles", "majority")
            for policy in ("dense", "dynamic:coverage=0.98", "fixed:sinks:16+window:1024")
        ),
        record("majority", 32_768, "dynamic:k=160,sampled=false,dense_layers=1"),
        record(
            "majority",
            32_768,
            "dynamic:k=160,sampled=false,dense_layers=1,min_coverage=0.9",
            fallbacks=1234,
        ),
        record("majority", 32_768, "dynamic:k=384,sampled=false", n=256, **single),
        record("majority", 32_768, "dynamic:k=192,sampled=false,dense_layers=1", n=256, **single),
        *(
            record(task, 32_768, f"dynamic:k={k}", **single)
            for k in (128, 64)
            for task in ("needle", "needles", "majority")
        ),
        *(
            record("text", context, "dense", accuracy=None, bits_per_byte=bits, scores=scores)
            for context, bits, scores in (
                (2048, 1.5, [[15.0, 10], [15.0, 10]]),
                (32_768, 1.25, [[12.0, 10], [13.0, 10]]),
            )
        ),
    ]
    pooled, dense, cells, majority, coverage, text = quality.tables(records)
    lines = [line for line in pooled.splitlines() if line.startswith("| 32,768")]
    assert len(lines) == 2 and "160" not in pooled and "k=64" not in pooled
    assert "\n10.0 points of accuracy are lost (at most 1: missed) at a mean density" in pooled
    assert "65,536 tokens" in pooled and "(at most 3%)" in pooled
    assert "15.0 points, of `needles` (at most 3: missed)" in pooled
    assert "| task | 4,096 | 32,768 | 65,536 |" in dense and "| `needles` |  | 1.000 |" in dense
    assert "4,096" not in cells and "k=" not in cells
    ballots, top_k = majority.split("\n\nPlain top-k")
    assert ballots.count("| 32,768 |") == 5 and "| 1,234 |" in ballots
    assert [line.split(" | ")[1:3] for line in top_k.splitlines() if "32,768" in line] == [
        ["192", "dense"],
        ["384", ""],
    ]
    assert "65,536" not in majority
    rows = [line for line in coverage.splitlines() if "dynamic:k=" in line]
    assert ["k=64" in row for row in rows] == [True, False]
    assert "| 60 | 0.900 | 0.690 | 0.0100 | 0.200 | 0.05 (0.05) | 0.10% (0.10%) |" in rows[0]
    assert "cost -0.250 (-0.300 to -0.200) bits per byte more" in text.replace("\n", " ")


def test_measuring_needs_no_more_than_a_gpu_machine_has():
    code = (
        f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
        "import tests.bench.quality, service.eval.evaluation, service.engine.build\n"
        "import service.eval.workers, service.eval.results, service.sparsity"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_says_what_the_results_say():
    done = subprocess.run(
        [sys.executable, "tests/bench/quality.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
