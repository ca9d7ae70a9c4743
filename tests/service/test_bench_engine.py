"""`saccade bench engine` on the tiny shape: what is measured, and what is said of it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from kernels.page import PAGE
from models.decoder import Decoder
from service import cli
from service.bench import engine
from service.bench.cell import Cell, bandwidth_of
from service.bench.engine import Options, measure, step_bytes
from service.bench.shapes import shape_of
from service.errors import ConfigError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = shape_of("tiny")


def test_both_policies_of_every_cell_are_measured(monkeypatch):
    monkeypatch.setattr("kernels.gpu.layout.SPANS", 2)
    monkeypatch.setattr("kernels.gpu.launch.PROGRAMS", 2)
    cells = [Cell(1, 100), Cell(2, 3 * PAGE)]
    options = Options(keys=130, repeats=1, steps=1, bandwidth=1e-6)
    records, skipped = measure(TINY, cells, DEVICE, torch.float32, options)
    assert skipped == []
    assert [(r.batch, r.context, r.policy) for r in records] == [
        (cell.batch, cell.context, policy) for cell in cells for policy in ("dense", "dynamic")
    ]
    for dense, dynamic in zip(records[::2], records[1::2], strict=True):
        assert dense.keys == dense.context + 1
        assert 64 < dynamic.keys <= dense.keys
        assert dense.ratio == 1.0
        assert dynamic.dense_us == dense.dense_us == dense.us
        assert dynamic.ratio == pytest.approx(dense.us / dynamic.us)
        for one in (dense, dynamic):
            assert one.tokens_per_s == pytest.approx(one.batch / one.us * 1e6)
            assert one.ceiling_share == pytest.approx(one.bytes / one.us)  # a byte a microsecond


def test_bytes_are_those_of_weights_and_keys():
    decoder = Decoder(shape_of("llama-3.1-8b", layers=2), torch.bfloat16, "meta")
    inner = 128 * (32 + 2 * 8 + 32) + 3 * 14_336  # rows of a layer's matrices
    weights = 2 * (2 * (inner * 4096 + 2 * 4096) + 128_256 * 4096 + 4096)
    cell = Cell(3, 5000)
    assert step_bytes(decoder, cell, 5001, dynamic=False) == weights + 3 * 2 * 8 * 5001 * 512
    assert step_bytes(decoder, cell, 1000, dynamic=True) == (
        weights + 3 * 2 * 8 * (5000 * 19 + 1000 * 512)
    )


def test_cells_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    shape, gpu = shape_of("llama-3.1-8b"), torch.device("cuda")
    cells = [Cell(1, 1024), Cell(1, 131_072)]
    fitting, skipped = engine._fitting(shape, cells, gpu, torch.bfloat16)
    assert fitting == cells[:1]
    (sentence,) = skipped
    assert sentence.startswith("1 x 131072 is left out: it needs 20 GiB")


def test_the_bandwidth_follows_the_device():
    assert bandwidth_of("NVIDIA H200") == 4.55
    assert bandwidth_of("NVIDIA H100 80GB HBM3") == 3.2
    assert bandwidth_of("2 threads, AVX512") is None


def test_an_unknown_shape_is_refused_and_layers_can_be_fewer():
    with pytest.raises(ConfigError, match="llama"):
        shape_of("gpt")
    config = shape_of("llama-3.1-8b", layers=3)
    assert (config.layers, len(config.windows)) == (3, 3)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["saccade", "bench", "engine", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_prints_a_table_and_writes_the_records(monkeypatch, tmp_path, capsys):
    output = tmp_path / "engine.json"
    code = run(
        monkeypatch,
        *("--shape", "tiny", "--layers", 1, "--cells", "1x70", "--device", DEVICE.type),
        *("--dtype", "float32", "--repeats", 1, "--steps", 1, "--keys", 70),
        *("--output", output, "--commit", "abc", "--bandwidth", 2),
    )
    assert not code
    printed = capsys.readouterr()
    assert "dynamic" in printed.out
    assert "turn" in printed.err
    saved = json.loads(output.read_text())
    assert saved["commit"] == "abc"
    assert saved["settings"]["layers"] == 1
    assert saved["settings"]["bandwidth_tb_s"] == 2
    assert saved["skipped"] == []
    assert [record["policy"] for record in saved["records"]] == ["dense", "dynamic"]
    assert set(saved["records"][0]) == {
        *("batch", "context", "policy", "keys", "us", "bytes", "dense_us", "ratio"),
        *("tokens_per_s", "ceiling_share"),
    }


@pytest.mark.parametrize("cells", ["1", "1x", "0x5", "1x1024;2x8", "ax3"])
def test_cells_of_another_form_are_refused(monkeypatch, cells):
    assert "--cells must be" in run(monkeypatch, "--device", "cpu", "--cells", cells)


def test_a_cpu_is_for_trials_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in run(monkeypatch, "--device", "cpu", "--shape", "tiny")


def test_a_shape_of_patterns_has_its_prompts_timed(capsys):
    from service.commands.bench import engine

    fields = {"device": "cpu", "dtype": "float32", "layers": 2, "repeats": 1, "output": None}
    with pytest.raises(ConfigError, match="--prompt"):
        engine(shape="sparse-transformer", cells="1x64", prompt=0, chunk=64, keys=1, **fields)
    engine(shape="sparse-transformer", cells="1x64", prompt=128, chunk=64, keys=1, **fields)
    assert "100.00%" in capsys.readouterr().out
    assert len(shape_of("sparse-transformer", 5).patterns) == 5
