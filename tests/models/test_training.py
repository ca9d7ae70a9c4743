"""One tiny run of the recipe: two pieces, the state's files, the exported checkpoint."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from models.training.attention import Attention
from models.training.checkpoint import write_checkpoint
from models.training.errors import TrainingError
from models.training.filler import prose
from models.training.llama import TrainingLlama
from models.training.optimiser import Optimiser, orthogonalise
from models.training.plans import PLANS, find_plan
from models.training.prepare import prepare
from models.training.run import Settings
from models.training.state import load_state, save_state
from models.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in two pieces: (trainer after piece 1, facts then, trainer at the end, folders)."""
    root = tmp_path_factory.mktemp("run")
    (root / "text").mkdir()
    (root / "text" / "one.txt").write_text(prose(5, 150_000), encoding="utf-8")
    plan = PLANS["tiny"]
    settings = Settings(
        out=root / "out",
        state=root / "state",
        deadline=time.monotonic() + 300,
        workers=1,
        compile_parts=False,
        steps=4,
        max_shard=None,
    )
    data = prepare(root / "text", None, plan, root / "scratch", root / "state")
    first = Trainer(plan, data, settings)
    finished_early = first.run()
    facts = first.facts
    unlimited = Settings(settings.out, settings.state, settings.deadline, 1, False)
    second = Trainer(plan, data, unlimited)
    resumed = second.facts
    finished = second.run()
    return {
        "root": root,
        "data": data,
        "first": facts,
        "resumed": resumed,
        "last": second.facts,
        "finished": (finished_early, finished),
        "model": second.model,
    }


def test_a_second_piece_goes_on_where_the_first_stopped(run):
    first, resumed, last = run["first"], run["resumed"], run["last"]
    assert run["finished"] == (False, True)
    for name in ("step", "batch", "clock", "tokens_seen", "stages_done"):
        assert resumed[name] == first[name]
    assert first["step"] == 4
    assert last["step"] > 4
    assert last["clock"] >= PLANS["tiny"].seconds
    assert last["longest"] == 512
    lines = (run["root"] / "state" / "training_log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)


def test_the_log_and_the_card_hold_the_last_check(run):
    out = run["root"] / "out"
    record = [json.loads(s) for s in (out / "training_log.jsonl").read_text().splitlines()]
    assert {s["task"] for s in record[-1]["retrieval"]} >= {"single", "key_value"}
    card = (out / "README.md").read_text()
    assert "Apache-2.0" in card
    assert f"{run['last']['step']} steps" in card
    assert "{" not in card.replace("{key}", "")


def test_state_files_stay_below_their_limit_and_load_again(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.q": torch.randn(3, 200, 170, generator=generator),
        "muon.q": torch.randn(3, 200, 170, generator=generator),
        "adam.embed.exp_avg": torch.randn(500, 10, generator=generator),
    }
    limit = 256 * 2**10
    save_state(tmp_path, tensors, {"step": 1}, max_file=limit)
    save_state(tmp_path, tensors, {"step": 2}, max_file=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.name.startswith("state-000002") for file in files)
    assert all(file.stat().st_size <= limit for file in tmp_path.iterdir())
    loaded, facts = load_state(tmp_path)
    assert facts == {"step": 2}
    assert torch.equal(loaded["model.q"], tensors["model.q"])
    momentum = tensors["muon.q"]
    scale = momentum.abs().amax(-1, keepdim=True)
    assert ((loaded["muon.q"] - momentum).abs() <= scale / 254 + 1e-6).all()
    adam = tensors["adam.embed.exp_avg"]
    torch.testing.assert_close(loaded["adam.embed.exp_avg"], adam, rtol=2**-8, atol=0)


def test_the_state_of_the_full_model_fits_in_64_mib_of_small_files(tmp_path):
    model = TrainingLlama(PLANS["full"].shape, dtype=torch.float32, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 12_194_688
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    tensors |= {f"muon.{n}": getattr(model, n) for n in ("q", "k", "v", "o", "gate", "up", "down")}
    tensors |= {f"adam.embed.{m}": model.embed for m in ("exp_avg", "exp_avg_sq")}
    save_state(tmp_path, tensors, {"step": 1})
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert max(sizes) <= 16 * 2**20
    assert sum(sizes) <= 64 * 2**20


def test_damaged_state_is_refused_in_one_sentence(tmp_path):
    save_state(tmp_path, {"model.q": torch.zeros(4, 4)}, {"step": 1})
    next(tmp_path.glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_state(tmp_path)


@pytest.mark.parametrize("max_shard", [None, 100 * 2**10])
def test_the_checkpoint_loads_in_transformers_with_equal_logits(run, tmp_path, max_shard):
    transformers = pytest.importorskip("transformers")
    model = run["model"]
    if max_shard:
        max_shard += 64 * 2**10
    write_checkpoint(
        tmp_path,
        dict(model.named_parameters()),
        PLANS["tiny"].shape,
        tokenizer=run["data"].tokenizer,
        log=run["root"] / "state" / "training_log.jsonl",
        facts=run["last"],
        max_length=512,
        max_shard=max_shard,
        dtype=torch.float32,
    )
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    if max_shard is None:
        assert len(sizes) == 1
    else:
        assert len(sizes) > 1
        assert max(sizes) <= max_shard
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert other.config.rope_parameters["rope_theta"] == 1e6
    tokens = torch.randint(8, 512, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = other(tokens).logits
    assert (model.logits(tokens) - expected).abs().max() < 1e-4


def test_the_exported_folder_is_bfloat16_with_tokenizer_and_chat_template(run):
    transformers = pytest.importorskip("transformers")
    out = run["root"] / "out"
    assert all(t.dtype == torch.bfloat16 for t in load_file(out / "model.safetensors").values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Trace VAR ABCDE."}],
        add_generation_prompt=True,
        return_dict=False,
    )
    text = "<|bos|><|user|>\nTrace VAR ABCDE.<|end|>\n<|assistant|>\n"
    assert (
        ids
        == Tokenizer.from_file(str(out / "tokenizer.json"))
        .encode(text, add_special_tokens=False)
        .ids
    )
    assert tokenizer("Trace")["input_ids"][0] == tokenizer.bos_token_id == 0
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 6]


def test_a_state_of_another_plan_is_refused(run):
    settings = Settings(Path("out"), run["root"] / "state", time.monotonic() + 60, 1, False)
    with pytest.raises(TrainingError, match="plan 'tiny'"):
        Trainer(PLANS["quick"], run["data"], settings)


def test_an_unknown_plan_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(TrainingError, match="choose one of"):
        find_plan("huge")
    with pytest.raises(TrainingError, match=r"no \.txt file"):
        prepare(tmp_path, None, PLANS["tiny"], tmp_path / "s", tmp_path / "t")


def test_the_rate_warms_up_holds_and_falls_to_two_percent():
    plan = PLANS["full"]
    assert plan.rate(0.0, 0) == pytest.approx(0.01)
    assert plan.rate(0.3, 500) == 1.0
    assert plan.rate(1.0, 500) == pytest.approx(0.02)
    assert plan.stage(0.0).length == 2048
    assert plan.stage(1.0).length == 32_768


def test_newton_schulz_brings_singular_values_near_one():
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_an_optimiser_step_clears_gradients_and_lowers_the_loss():
    model = TrainingLlama(PLANS["tiny"].shape, dtype=torch.float32, seed=0)
    optimiser = Optimiser(model, muon_rate=4e-3, adam_rate=3e-3)
    tokens = torch.from_numpy(np.arange(256).reshape(2, 128) % 40 + 8)
    losses = []
    for _ in range(4):
        loss = model.losses(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        optimiser.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_attention_is_causal_and_shares_kv_heads():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2 * 5, 4, 8, generator=generator)  # [rows * length, heads, dim]
    k, v = (torch.randn(2 * 5, 2, 8, generator=generator) for _ in range(2))
    out = Attention()(q, k, v, 2).view(2, 5, 4, 8)
    for row in range(2):
        for head in range(4):
            keys = k.view(2, 5, 2, 8)[row, :, head // 2]  # [length, dim]
            values = v.view(2, 5, 2, 8)[row, :, head // 2]
            scores = q.view(2, 5, 4, 8)[row, :, head] @ keys.T / 8**0.5  # [length, length]
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
            torch.testing.assert_close(out[row, :, head], scores.softmax(-1) @ values)
    grouped = Attention(grouped=True)(q, k, v, 2).view(2, 5, 4, 8)
    torch.testing.assert_close(grouped, out)
