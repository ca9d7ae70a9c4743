"""Several processes that train one model: on the CPU, through gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.training.filler import prose
from models.training.plans import PLANS
from models.training.ranks import Ranks
from models.training.schedule import Schedule
from models.training.state import load_state
from models.training.train import main

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks would use the GPUs")


def _arguments(root, *more):
    text = root / "text"
    if not text.exists():
        text.mkdir()
        (text / "one.txt").write_text(prose(5, 150_000), encoding="utf-8")
    folders = [f"--text={text}", f"--state={root / 'state'}", f"--out={root / 'out'}"]
    # Counted from when the module was imported, long ago where many tests came before.
    return [*folders, "--plan=tiny", "--minutes=600", "--workers=1", *more]


def _log(root):
    text = (root / "state" / "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_two_ranks_stay_equal_and_any_number_goes_on(tmp_path):
    tokens = PLANS["tiny"].step_tokens
    assert main(_arguments(tmp_path, "--gpus=2", "--steps=3")) == 0
    _, facts = load_state(tmp_path / "state")
    assert facts["step"] == 3
    assert facts["device"] == "2 x CPU"
    assert facts["batch"] >= 6
    assert facts["tokens_seen"] == facts["batch"] * tokens
    assert 0 < facts["text_tokens_seen"] < facts["tokens_seen"]
    assert _log(tmp_path)[-1]["rank_difference"] == 0.0

    assert main(_arguments(tmp_path, "--gpus=1", "--steps=1")) == 0
    _, alone = load_state(tmp_path / "state")
    assert alone["step"] == 4
    assert alone["batch"] - facts["batch"] in (1, 2)
    assert alone["tokens_seen"] == alone["batch"] * tokens

    assert main(_arguments(tmp_path, "--gpus=2")) == 0
    _, last = load_state(tmp_path / "state")
    assert last["clock"] >= PLANS["tiny"].seconds
    assert last["tokens_seen"] == last["batch"] * tokens
    differences = [x["rank_difference"] for x in _log(tmp_path) if "rank_difference" in x]
    assert set(differences) == {0.0}  # on a busy machine the last run may have no time left
    assert "retrieval" in _log(tmp_path)[-1]
    assert "on 2 x CPU" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


class _Requests:
    """A loader that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    @property
    def outstanding(self):
        return len(self.asked)

    def submit(self, request):
        self.asked.append(request)


@pytest.mark.parametrize("first", [0, 5])  # 5: a piece before had another number of ranks
def test_ranks_share_out_the_batches_and_agree_on_their_length(first):
    asked = []
    for rank in range(2):
        facts = {"batch": first, "seed": 0, "text_rate": 0.0}
        schedule = Schedule(PLANS["full"], facts, text_tokens=1000, ranks=Ranks(rank, 2))
        asked.append(_Requests())
        schedule.ask(asked[rank], 0.5)
    lengths = [[request.length for request in requests.asked] for requests in asked]
    assert lengths[0] == lengths[1]
    assert len(set(lengths[0])) > 1
    indices = sorted(request.index for requests in asked for request in requests.asked)
    assert indices == list(range(first, first + 48))


def _children(pid):
    """Processes started by `pid` through multiprocessing, oldest first."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in listed
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def _wait_for(condition, process):
    end = time.monotonic() + 200
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.fixture
def started(tmp_path):
    """The module as a process of two ranks."""
    command = [sys.executable, "-m", "models.training.train", *_arguments(tmp_path, "--gpus=2")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("when", ["starting", "training"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_run(started, tmp_path, when):
    if when == "training":
        _wait_for((tmp_path / "state" / "training_log.jsonl").exists, started)
    ranks = _wait_for(lambda: found if len(found := _children(started.pid)) == 2 else 0, started)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = started.communicate(timeout=200)
    assert started.returncode == 1
    if when == "starting":
        assert "'rank 1' of 2 ended with exit code -9" in errors
    else:  # the other may notice first
        assert re.search(r"'rank [01]' of 2 ended with exit code (-9|1)", errors)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_stops_all_ranks_and_saves(started, tmp_path):
    log = tmp_path / "state" / "training_log.jsonl"
    _wait_for(log.exists, started)
    ranks = _children(started.pid)
    workers = [worker for rank in ranks for worker in _children(rank)]
    started.send_signal(signal.SIGTERM)
    output, errors = started.communicate(timeout=200)
    assert started.returncode == 0, errors
    assert "piece ended at" in output or "checkpoint written" in output
    assert load_state(tmp_path / "state") is not None
    assert not any(Path(f"/proc/{process}").exists() for process in [*ranks, *workers])
