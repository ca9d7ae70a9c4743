"""Several processes find what one finds, and what fails in one of them ends the evaluation."""

from __future__ import annotations

import json
import multiprocessing
import os

import pytest
import torch

from service.config import SparsityConfig
from service.errors import ConfigError, GenerationError
from service.eval.measure import Item, Plan
from service.eval.policies import parse_policy
from service.eval.record import record_cell
from service.eval.workers import Setup, _devices, examine
from tests.service.conftest import saccade, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def setup(checkpoint):
    names = ("dense", "dynamic:k=256", "fixed:sinks:4+window:64")
    policies = tuple(parse_policy(name, SparsityConfig()) for name in names)
    return Setup(checkpoint, "float32", "safetensors", (), 2048, Plan(policies, 2, seed=3))


def records(setup, items, workers):
    found = dict(examine(setup, items, CPU, workers))
    assert set(found) == set(items)
    return [
        record_cell(task, 2048, [found[Item(task, 2048, i)] for i in range(2)], passages=passages)
        for task, passages in (("needle", False), ("majority", False), ("text", True))
    ]


def test_two_workers_find_what_one_does(setup):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: sums have one order
    try:
        items = [Item(t, 2048, i) for t in ("needle", "majority", "text") for i in range(2)]
        assert records(setup, items, 2) == records(setup, items, 1)
    finally:
        torch.set_num_threads(threads)
    assert not multiprocessing.active_children()
    assert "TQDM_DISABLE" not in os.environ


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_document_ends_the_evaluation(setup, workers):
    # Too short to repeat anything.
    items = [Item("needle", 2048, 0), Item("repeats", 1024, 0)]
    with pytest.raises((ConfigError, GenerationError), match="2048 tokens or more"):
        list(examine(setup, items, CPU, workers))
    assert not multiprocessing.active_children()


def test_a_mistake_in_a_worker_brings_its_traceback(setup):
    with pytest.raises(RuntimeError, match="KeyError: 'no such task'"):
        list(examine(setup, [Item("no such task", 2048, i) for i in range(2)], CPU, 2))


def test_a_worker_that_dies_is_noticed(setup):
    found = examine(setup, [Item("needle", 2048, i) for i in range(64)], CPU, 2)
    next(found)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(GenerationError, match="died"):
        list(found)
    assert not multiprocessing.active_children()


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
