"""A run that starts from an exported checkpoint: weights, tokenizer, record, refusals."""

import json
import time
from dataclasses import replace

import pytest
import torch

from models.training.checkpoint import write_checkpoint
from models.training.errors import TrainingError
from models.training.filler import prose
from models.training.llama import TrainingLlama
from models.training.plans import PLANS
from models.training.prepare import prepare
from models.training.run import Settings
from models.training.start import read_start
from models.training.state import load_state
from models.training.trainer import Trainer

PLAN = PLANS["tiny"]
OLD_LOG = (
    '{"step": 0, "plan": "quick", "device": "Abacus"}\n'
    '{"step": 5, "clock": 30.0, "tokens": 4000000, "longest": 256}\n'
    '{"step": 9, "clock": 60.0, "tokens": 7000000, "longest": 256}\n'
    '{"step": 9, "retrieval": []}\n'
)
FACTS = {
    "plan": "quick",
    "parameters": 1,
    "text_files": 1,
    "text_bytes": 1,
    "text_tokens": 1,
    "text_tokens_seen": 1,
    "tokens_seen": 7_000_000,
    "step": 9,
    "clock": 60.0,
    "device": "Abacus",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "one.txt").write_text(prose(5, 150_000), encoding="utf-8")
    return folder


@pytest.fixture
def checkpoint(text, tmp_path):
    """Writes a checkpoint of random weights: (weights, folder)."""

    def write(max_shard=None, log=OLD_LOG):
        data = prepare(text, None, PLAN, tmp_path / "scratch-0", tmp_path / "state-0")
        model = TrainingLlama(PLAN.shape, dtype=torch.float32, seed=11)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        (tmp_path / "log").write_text(log, encoding="utf-8")
        write_checkpoint(
            tmp_path / "start",
            weights,
            PLAN.shape,
            tokenizer=data.tokenizer,
            log=tmp_path / "log",
            facts=FACTS,
            max_length=256,
            max_shard=max_shard,
        )
        return weights, tmp_path / "start"

    return write


def _run(text, root, start, steps, plan=PLAN):
    state = root / "state"
    settings = Settings(
        out=root / "out",
        state=state,
        deadline=time.monotonic() + 300,
        workers=1,
        compile_parts=False,
        steps=steps,
        start=start,
    )
    trainer = Trainer(plan, prepare(text, None, plan, root / "scratch", state, start), settings)
    trainer.run()
    return trainer


@pytest.mark.parametrize("max_shard", [None, 164 * 2**10])
def test_weights_and_tokenizer_are_the_checkpoints(checkpoint, text, tmp_path, max_shard):
    weights, start = checkpoint(max_shard)
    assert (len(list(start.glob("*.safetensors"))) > 1) is (max_shard is not None)
    (start / "tokenizer.json").open("a", encoding="utf-8").write("\n")  # to be recognised
    trainer = _run(text, tmp_path, start, steps=0)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16().float()), name
    expected = (start / "tokenizer.json").read_bytes()
    assert (tmp_path / "state" / "tokenizer.json").read_bytes() == expected
    tensors, facts = load_state(tmp_path / "state")
    assert facts["step"] == facts["tokens_seen"] == 0
    assert not any(tensor.any() for name, tensor in tensors.items() if name.startswith("muon."))


def test_log_and_card_tell_of_all_runs(checkpoint, text, tmp_path):
    _, start = checkpoint()
    earlier = {"plan": "quick", "device": "Abacus", "tokens_seen": 7_000_000, "seconds": 60.0}
    plan = replace(PLAN, minutes=60.0)  # so long that on no machine a stage ends in these steps
    assert _run(text, tmp_path, start, 2, plan).facts["start"] == [earlier]
    second = _run(text, tmp_path, None, 1, plan)  # goes on, and needs the checkpoint no more
    assert second.facts["step"] == 3
    second.export()
    out = tmp_path / "out"
    log = (out / "training_log.jsonl").read_text(encoding="utf-8")
    assert log.startswith(OLD_LOG)
    lines = [json.loads(line) for line in log.removeprefix(OLD_LOG).splitlines()]
    assert lines[0]["plan"] == "tiny"
    assert [line["step"] for line in lines] == [0, 2, 3]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert (
        "by plan `quick` (7 million tokens, 1.0 minutes on Abacus), then by plan `tiny` (" in card
    )
    assert "--plan quick`, then with `--plan tiny --start CHECKPOINT`" in card
    # A third run would know both.
    runs = read_start(out, PLAN.shape).runs
    assert [run["plan"] for run in runs] == ["quick", "tiny"]
    assert runs[0] == earlier
    assert runs[1]["tokens_seen"] == second.facts["tokens_seen"]


def test_a_plan_may_keep_a_share_of_what_it_changed(checkpoint, text, tmp_path, monkeypatch):
    weights, start = checkpoint()
    plan = replace(PLAN, minutes=0.0, blend=0.25)
    trainer = Trainer(
        plan,
        prepare(text, None, plan, tmp_path / "scratch", tmp_path / "state", start),
        Settings(tmp_path / "out", tmp_path / "state", 0.0, 1, False, start=start),
    )
    changed = {}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            changed[name] = parameter.add_(0.1).clone()
    assert trainer.run()
    for name, parameter in trainer.model.named_parameters():
        expected = 0.25 * changed[name] + 0.75 * weights[name].bfloat16().float()
        torch.testing.assert_close(parameter.detach(), expected)
    runs = read_start(tmp_path / "out", PLAN.shape).runs
    assert runs[-1]["blend"] == 0.25
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "25% of its change of the weights kept" in card
    # The state is blended too: what goes on from it has no need of the start, and exports the same.
    again = Settings(tmp_path / "out", tmp_path / "state", 0.0, 1, False)
    later = Trainer(plan, prepare(text, None, plan, tmp_path / "s2", again.state), again)
    assert later.run()
    later.export()
    for (name, one), (_, two) in zip(
        trainer.model.named_parameters(), later.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, msg=name)
    log = (tmp_path / "out" / "training_log.jsonl").read_text(encoding="utf-8")
    assert log.count('"blend"') == 1


def test_a_plan_that_keeps_a_share_needs_its_start_and_another_folder(checkpoint, text, tmp_path):
    _, start = checkpoint()
    plan = replace(PLAN, minutes=0.0, blend=0.25)
    data = prepare(text, None, plan, tmp_path / "scratch", tmp_path / "state", start)
    for out, given in ((start, start), (tmp_path / "out", None)):
        settings = Settings(out, tmp_path / "state", 0.0, 1, False, start=given)
        with pytest.raises(TrainingError, match="--start"):
            Trainer(plan, data, settings)


def test_a_checkpoint_without_record_starts_a_run_too(checkpoint):
    _, start = checkpoint()
    (start / "training_log.jsonl").unlink()
    unknown = read_start(start, PLAN.shape).runs
    assert unknown == [{"plan": None, "device": None, "tokens_seen": None, "seconds": None}]


def test_another_shape_is_refused(checkpoint, text, tmp_path):
    _, start = checkpoint()
    with pytest.raises(TrainingError, match="vocab_size 512, the plan's shape 4096"):
        read_start(start, PLANS["full"].shape)
    path = start / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"rope_theta": 1e4}), encoding="utf-8")
    with pytest.raises(TrainingError, match="rope_theta"):
        _run(text, tmp_path, start, steps=0)


def test_an_incomplete_checkpoint_is_refused(checkpoint, text, tmp_path):
    _, start = checkpoint()
    (start / "model.safetensors").write_bytes(b"short")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_start(start, PLAN.shape)
    (start / "tokenizer.json").unlink()
    with pytest.raises(TrainingError, match=r"tokenizer\.json is missing"):
        prepare(text, None, PLAN, tmp_path / "s", tmp_path / "t", start)
