"""Several processes find what one finds, and what fails in one of them ends the evaluation."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from service.errors import ConfigError, GenerationError
from service.eval.cell import Cell, Item
from service.eval.crew import Crew
from service.eval.drawer import Drawing
from service.eval.policies import parse_policy
from service.eval.record import record_cell
from service.eval.workers import Setup, _batches, _devices, examine
from service.sparsity import SparsityConfig
from tests.service.conftest import saccade, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def setup(checkpoint):
    return Setup(checkpoint, "float32", "safetensors", 2048)


@pytest.fixture
def drawing(checkpoint):
    return Drawing(checkpoint, questions=2, seed=3)


def cell(task, documents=2, context=2048):
    # No sample: kernels that numba compiles apart round apart, and a mark falls on the next key.
    names = ("dense", "dynamic:k=256,sampled=false", "fixed:sinks:4+window:64")
    policies = tuple(parse_policy(name, SparsityConfig()) for name in names)
    return Cell(task, context, documents, policies)


def records(setup, drawing, cells, **processes):
    found = dict(examine(setup, drawing, cells, CPU, **processes))
    assert len(found) == sum(one.documents for one in cells)
    return [
        record_cell(
            one.task,
            one.context,
            [found[Item(one, number)] for number in range(one.documents)],
            passages=one.passages,
        )
        for one in cells
    ]


def assert_alike(actual, expected):
    """The same records but for rounding: numba's code just compiled and loaded adds differently."""
    for one, other in zip(chain(*actual), chain(*expected), strict=True):
        first, second = asdict(one), asdict(other)
        scores = [np.array(some.pop("scores")) for some in (first, second)]
        np.testing.assert_allclose(*scores, rtol=1e-5)
        assert first.keys() == second.keys()
        for name, value in first.items():
            if isinstance(value, float):
                assert value == pytest.approx(second[name], rel=1e-4, abs=1e-6), name
            else:
                assert value == second[name], name


def test_any_number_of_processes_finds_the_same(setup, drawing):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: sums have one order
    try:
        cells = [cell("needle", 2)]
        cells += [cell(task, 1) for task in ("majority", "text", "free-text")]
        alone = records(setup, drawing, cells)
        assert_alike(records(setup, drawing, cells, workers=2), alone)
        assert_alike(records(setup, drawing, cells, workers=1, drawers=2), alone)
    finally:
        torch.set_num_threads(threads)
    assert not multiprocessing.active_children()
    assert "TQDM_DISABLE" not in os.environ


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_document_ends_the_evaluation(setup, drawing, workers):
    # Too short to repeat anything.
    cells = [cell("needle", 1), cell("repeats", 1, context=1024)]
    with pytest.raises((ConfigError, GenerationError), match="2048 tokens or more"):
        list(examine(setup, drawing, cells, CPU, workers))
    assert not multiprocessing.active_children()


def test_a_missing_model_ends_the_evaluation(setup, drawing, tmp_path):
    broken = replace(setup, model=tmp_path)
    with pytest.raises(GenerationError, match="is missing"):
        list(examine(broken, drawing, [cell("needle", 2)], CPU, 2))
    assert not multiprocessing.active_children()


def test_a_mistake_in_a_process_brings_its_traceback(setup, drawing):
    # No number.
    wrong = replace(drawing, seed="x")
    with pytest.raises(RuntimeError, match=r"a process failed:\nTraceback"):
        list(examine(setup, wrong, [cell("needle", 2)], CPU, 2))


@pytest.mark.parametrize(("workers", "drawers"), [(2, 0), (1, 2)])
def test_a_process_that_dies_is_noticed(setup, drawing, workers, drawers):
    found = examine(setup, drawing, [cell("needle", 64)], CPU, workers, drawers)
    next(found)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(GenerationError, match="died"):
        list(found)
    assert not multiprocessing.active_children()


def test_an_evaluation_that_is_left_leaves_no_process(setup, drawing):
    found = examine(setup, drawing, [cell("needle", 64)], CPU, 1, 2)
    next(found)
    assert len(multiprocessing.active_children()) == 3
    found.close()
    assert not multiprocessing.active_children()


def _stay(pipe):
    """An owner that starts a process and is stopped with it at work."""
    with Crew("worker", [_sleeper]) as crew:
        [ready] = crew.busy
        crew.hear(ready)
        crew.give(0.5)
        pipe.send(next(iter(crew._processes.values())).pid)
        time.sleep(60)


def _sleeper():
    return time.sleep


def test_a_process_whose_owner_is_gone_ends():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=_stay, args=(theirs,))
    owner.start()
    child = ours.recv()
    owner.kill()
    owner.join()
    for _ in range(100):
        if (
            not Path(f"/proc/{child}/cmdline").exists()
            or not Path(f"/proc/{child}/cmdline").read_bytes()
        ):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process outlived its owner")


def test_batches_fill_a_gpu_and_are_even():
    cells = [cell("needles", 100), cell("needle", 170), cell("text", 100), cell("majority", 3)]
    cells.append(cell("free-text", 40))
    sizes = defaultdict(list)
    for one in _batches(cells, 10, torch.device("cuda")):
        sizes[one.cell.task].append(len(one.numbers))
    assert sizes["needles"] == [15, 15, 14, 14, 14, 14, 14]
    assert sizes["needle"] == [85, 85]
    assert sizes["text"] == [34, 33, 33]
    assert sizes["majority"] == [3]
    assert sizes["free-text"] == [14, 13, 13]
    assert all(len(one.numbers) == 1 for one in _batches(cells, 10, CPU))


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = [torch.device("cuda", i) for i in range(2)]
    assert _devices(torch.device("cuda"), 3) == [*cuda, cuda[0]]
    assert _devices(cuda[1], 2) == [cuda[1]] * 2
    assert _devices(CPU, 2) == [CPU] * 2


def test_the_command_writes_the_same_file_with_any_number_of_workers(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    saved = []
    for workers in (1, 2):
        output, plot = tmp_path / f"{workers}.json", tmp_path / f"{workers}.svg"
        process = saccade(
            *("eval", folder, "--tasks", "needle,text", "--contexts", "2048", "--documents", 2),
            *("--questions", 1, "--policies", "dense;fixed:sinks:4+window:64", "--device", "cpu"),
            *("--workers", workers, "--output", output, "--plot", plot),
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "bits/byte" in out and "leaked" not in err
        assert plot.stat().st_size > 1000
        envelope = json.loads(output.read_text())
        saved.append({name: envelope[name] for name in ("records", "pooled", "settings")})
    assert saved[0] == saved[1]
    assert [len(r["scores"]) for r in saved[0]["records"]] == [2] * 4
