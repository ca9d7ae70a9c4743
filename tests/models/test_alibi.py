"""Bloom and MPT against transformers, however the tokens are cut into steps."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.attention import Impl
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic, Fixed
from models.alibi import slopes
from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError, ModelError, UnsupportedModelError
from models.graph import CapturedSteps
from models.loader import load
from tests.models.test_decoder import Runner, difference, one_shot, prompts

TOLERANCE = 4e-5
LENGTH = 330
BLOOM, MPT = "BloomForCausalLM", "MptForCausalLM"
CASES = {
    "bloom": (BLOOM, {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom-six-heads": (BLOOM, {"hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "bloom-untied": (
        BLOOM,
        {"hidden_size": 64, "n_layer": 1, "n_head": 2, "tie_word_embeddings": False},
    ),
    "mpt": (MPT, {"d_model": 64, "n_layers": 2, "n_heads": 4}),
    "mpt-seven-heads": (MPT, {"d_model": 112, "n_layers": 2, "n_heads": 7}),
    "mpt-clipped": (
        MPT,
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "attn_config": {"clip_qkv": 1.5}},
    ),
}


def make(case, folder):
    import transformers

    architecture, changes = CASES[case]
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(
        vocab_size=128, initializer_range=0.12, **changes
    )
    torch.manual_seed(0)
    oracle = getattr(transformers, architecture)(config).eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    oracle.save_pretrained(folder)
    return oracle


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_however_the_tokens_are_cut(case, tmp_path):
    oracle = make(case, tmp_path)
    decoder, _ = load(tmp_path, dtype="float32")
    assert decoder.impl is Impl.NUMBA
    (tokens,) = prompts(LENGTH)
    expected = oracle(torch.tensor([tokens])).logits[0]  # [tokens, vocab]
    assert difference(one_shot(decoder, tokens), expected) <= TOLERANCE

    runner, pieces, start = Runner(decoder, 1, LENGTH), [], 0
    for size in (7, 1, 57, 13, 64, 63, 120, 5):
        pieces += runner.step([(0, tokens[start : start + size])])
        start += size
    assert start == LENGTH
    assert difference(torch.cat(pieces), expected) <= TOLERANCE

    # Token by token, densely and by a selection of every key.
    for policy in (None, Dynamic(coverage=1.0, min_keys=4096, max_keys=4096)):
        runner = Runner(decoder, 1, LENGTH)
        pieces = [*runner.step([(0, tokens[:250])])]
        pieces += [runner.step([(0, [token])], policy)[0] for token in tokens[250:]]
        assert difference(torch.cat(pieces), expected) <= TOLERANCE


def test_float64_is_exact_and_so_is_a_selection_of_every_key(tmp_path):
    oracle = make("bloom-six-heads", tmp_path).double()
    decoder, _ = load(tmp_path, dtype="float64")
    (tokens,) = prompts(LENGTH)
    expected = oracle(torch.tensor([tokens])).logits[0]
    # transformers rounds slopes to float32.
    assert difference(one_shot(decoder, tokens), expected) < 1e-5
    policy, logits = Dynamic(coverage=1.0, min_keys=4096, max_keys=4096), []
    for choice in (None, policy, Fixed(Pattern.parse("full"))):
        runner = Runner(decoder, 1, LENGTH)
        runner.step([(0, tokens[:300])])
        logits.append(torch.cat([runner.step([(0, [token])], choice)[0] for token in tokens[300:]]))
    assert difference(logits[0], logits[1]) < 1e-10
    assert difference(logits[0], logits[2]) < 1e-10


def test_these_checkpoints_would_show_a_wrong_slope(tmp_path, monkeypatch):
    oracle = make("bloom", tmp_path)
    (tokens,) = prompts(LENGTH)
    expected = oracle(torch.tensor([tokens])).logits[0]
    decoder, _ = load(tmp_path, dtype="float32")
    for layer in decoder.model.layers:
        layer.self_attn.attend.slopes.mul_(1.01)
    assert difference(one_shot(decoder, tokens), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert torch.tensor(slopes(heads)).allclose(theirs, rtol=1e-6)
    for most in (8, 16):
        theirs = -build_mpt_alibi_tensor(heads, 2, most)[:, 0, 0]
        assert torch.tensor(slopes(heads, float(most))).allclose(theirs, rtol=1e-6)


def test_old_files_without_a_prefix_load_alike(tmp_path):
    make("bloom", tmp_path)
    one, _ = load(tmp_path, dtype="float32")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(tensors, file)
    two, _ = load(tmp_path, dtype="float32")
    other = two.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in one.state_dict().items())


def test_bfloat16_stays_near(tmp_path):
    oracle = make("bloom", tmp_path)
    (tokens,) = prompts(LENGTH)
    expected = oracle(torch.tensor([tokens])).logits[0]
    theirs = difference(oracle.bfloat16()(torch.tensor([tokens])).logits[0].float(), expected)
    logits = one_shot(load(tmp_path, dtype="bfloat16")[0], tokens)
    assert difference(logits, expected) <= theirs  # whose bias is rounded to bfloat16


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ("bloom", {"n_head": 5}, "n_head"),
        ("mpt", {"n_heads": 5}, "n_heads"),
        ("mpt", {"no_bias": False}, "no_bias"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln"),
        ("mpt", {"attn_config": {"softmax_scale": 0.3}}, "softmax_scale"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(case, changes, word, tmp_path):
    make(case, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=word):
        load(tmp_path)


def test_a_fused_projection_of_another_size_is_named_as_the_file_names_it(tmp_path):
    make("bloom", tmp_path)
    file = tmp_path / "model.safetensors"
    name = "transformer.h.1.self_attention.query_key_value.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name][:190].contiguous()}, file)
    with pytest.raises(CheckpointError, match=f"{name}.*190"):
        load(tmp_path)
    tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        load(tmp_path)
    save_file(tensors | {name: torch.zeros(192, 64), "transformer.h.7.x": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.7\.x"):
        load(tmp_path)


def test_lengths_beyond_the_trained_one_may_be_asked_for(tmp_path):
    make("bloom", tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert config.resolve_max_model_len(None) == 2048
    assert config.resolve_max_model_len(100_000) == 100_000
    with pytest.raises(ModelError, match="at least 1"):
        config.resolve_max_model_len(0)


def test_tritons_kernels_compute_it(few_programs, tmp_path):
    oracle = make("bloom-six-heads", tmp_path)
    plain, config = load(tmp_path, dtype="float32")
    decoder = Decoder(config, torch.float32, "cpu", Impl.TRITON)
    decoder.load_state_dict(plain.state_dict())
    (tokens,) = prompts(194)
    expected = oracle(torch.tensor([tokens])).logits[0]
    policy = Dynamic(coverage=1.0, min_keys=4096, max_keys=4096)
    runner = Runner(decoder, 1, 194)
    pieces = [*runner.step([(0, tokens[:191])])]
    pieces += [runner.step([(0, [token])], policy)[0] for token in tokens[191:]]
    assert difference(torch.cat(pieces), expected) <= TOLERANCE


def test_no_decode_steps_are_captured(tmp_path):
    make("bloom", tmp_path)
    decoder, _ = load(tmp_path, dtype="float32")
    assert not decoder.fused
    with pytest.raises(ModelError, match=BLOOM):
        CapturedSteps(decoder, Runner(decoder, 1, 64).caches, [])
