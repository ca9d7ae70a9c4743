"""Rotary frequencies and rotation against transformers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from models.config import ModelConfig
from models.rope import Rotary, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 1.25},
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-betas": YARN | {"beta_fast": 24.0, "beta_slow": 2.0},
    "yarn-untruncated": YARN | {"truncate": False},
    "yarn-steep": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """Our configuration and transformers' rotary embedding of the same parameters."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    oracle = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_parameters=CASES[request.param] | {"rope_theta": 500000.0},
    )
    (tmp_path / "config.json").write_text(json.dumps(oracle.to_dict()))
    return ModelConfig.from_folder(tmp_path), LlamaRotaryEmbedding(oracle)


def test_float32_frequencies_equal_transformers_to_the_last_bit(pair):
    config, oracle = pair
    frequencies = inverse_frequencies(config.rope, config.head_dim, torch.float32)
    assert torch.equal(frequencies, oracle.inv_freq)
    assert config.rope.attention_factor == oracle.attention_scaling


def test_rotation_equals_transformers(pair):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, oracle = pair
    positions = torch.tensor([0, 1, 7, 4096, 131071])
    q, k = torch.randn(5, 4, 128), torch.randn(5, 2, 128)
    cos, sin = oracle(q, positions[None])
    expected = apply_rotary_pos_emb(q, k, cos[0], sin[0])
    rotary = Rotary(config.rope, config.head_dim, torch.float32, "cpu")
    angles = rotary.angles(positions)
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotary.rotate(ours, angles), theirs, rtol=0, atol=1e-6)


def test_float64_frequencies_agree_and_are_finer(pair):
    config, _ = pair
    single = inverse_frequencies(config.rope, config.head_dim, torch.float32)
    double = inverse_frequencies(config.rope, config.head_dim, torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
    assert not torch.equal(single.double(), double)


def test_scores_depend_on_distance_alone(pair):
    config, _ = pair
    rotary = Rotary(config.rope, config.head_dim, torch.float64, "cpu")
    q, k = torch.randn(2, 1, 1, 128, dtype=torch.float64)

    def score(query_position, key_position):
        one, other = (
            rotary.rotate(x, rotary.angles(torch.tensor([position])))
            for x, position in ((q, query_position), (k, key_position))
        )
        return (one * other).sum().item()

    assert math.isclose(score(100, 40), score(100_060, 100_000), rel_tol=1e-9, abs_tol=1e-9)


def test_bfloat16_is_rotated_in_float32_and_rounded_once(pair):
    config, _ = pair
    rotary = Rotary(config.rope, config.head_dim, torch.bfloat16, "cpu")
    x = torch.randn(3, 2, 128).bfloat16()
    angles = rotary.angles(torch.tensor([5, 1000, 100_000]))
    assert angles[0].dtype == torch.float32
    assert torch.equal(rotary.rotate(x, angles), rotary.rotate(x.float(), angles).bfloat16())
