"""config.json in all its dialects, and what is refused."""

from __future__ import annotations

import json

import pytest

from models.config import ModelConfig
from models.errors import CheckpointError, ModelError, UnsupportedModelError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}


@pytest.fixture
def read(tmp_path):
    def read(config, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_folder(tmp_path)

    return read


def test_a_plain_llama(read):
    config = read(LLAMA | {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 3]})
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (3, 4, 2, 16)
    assert (config.rope.kind, config.rope.theta) == ("default", 10_000.0)
    assert config.windows == (None, None, None)
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm)
    assert not config.tied
    assert (config.bos_ids, config.eos_ids, config.dtype) == ((1,), (2, 3), "bfloat16")
    assert config.max_model_len == 512


def test_biases_and_norms_follow_the_architecture(read):
    def switches(config):
        return config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm

    biased = {"attention_bias": True, "mlp_bias": True}
    assert switches(read(LLAMA | biased)) == (True, True, True, False)
    assert switches(read(MISTRAL | biased)) == (False, False, False, False)
    assert switches(read(QWEN2)) == (True, False, False, False)
    assert switches(read(QWEN3)) == (False, False, False, True)
    assert switches(read(QWEN3 | {"attention_bias": True})) == (True, True, False, True)


def test_head_sizes_are_derived_or_explicit(read):
    assert read(LLAMA | {"head_dim": 32}).head_dim == 32
    assert read(LLAMA | {"head_dim": None}).head_dim == 16
    assert read(QWEN3).head_dim == 128  # the architecture's default, not hidden / heads
    absent = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert read(absent).kv_heads == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["default", "linear", "llama3"],
)
def test_both_forms_of_the_rotary_parameters_mean_the_same(old, new, read):
    assert read(LLAMA | old).rope == read(LLAMA | {"rope_parameters": new}).rope


def test_null_scaling_is_no_scaling(read):
    config = read(LLAMA | {"rope_theta": 1e6, "rope_scaling": None})
    assert (config.rope.kind, config.rope.theta) == ("default", 1e6)


def test_the_length_limit_follows_the_scaling(read):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read(QWEN2 | {"rope_scaling": yarn}).max_model_len == 2048
    tall = QWEN2 | {"rope_scaling": yarn, "max_position_embeddings": 2048}
    assert read(tall).max_model_len == 2048
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert read(LLAMA | linear).max_model_len == 512


def test_a_requested_length_is_checked(read):
    config = read(LLAMA)
    assert config.resolve_max_model_len(None) == 512
    assert config.resolve_max_model_len(100) == 100
    with pytest.raises(ModelError, match=r"600 tokens exceeds the 512.*max_position_embeddings"):
        config.resolve_max_model_len(600)
    with pytest.raises(ModelError, match="at least 1"):
        config.resolve_max_model_len(0)


def test_dynamic_scaling_is_refused_beyond_its_original_length(read):
    config = read(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert config.resolve_max_model_len(512) == 512
    with pytest.raises(UnsupportedModelError, match="cached keys are already rotated"):
        config.resolve_max_model_len(513)


def test_sliding_windows_of_each_layer(read):
    assert read(MISTRAL | {"sliding_window": 100}).windows == (100,) * 3
    assert read(MISTRAL | {"sliding_window": None}).windows == (None,) * 3
    assert read(MISTRAL).windows == (4096,) * 3  # what transformers takes when it is left out
    window = {"sliding_window": 50, "max_window_layers": 2}
    assert read(QWEN2 | window).windows == (None,) * 3
    assert read(QWEN2 | window | {"use_sliding_window": True}).windows == (None, None, 50)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = window | {"use_sliding_window": True, "layer_types": types}
    assert read(QWEN3 | mixed).windows == (50, None, 50)
    assert read(QWEN3 | window | {"layer_types": ["full_attention"] * 3}).windows == (None,) * 3


def test_generation_config_gives_ends_and_sampling_values(read):
    config = read(
        LLAMA | {"eos_token_id": 2},
        {"eos_token_id": [5, 2], "temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True},
    )
    assert config.eos_ids == (5, 2)
    generation = config.generation
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.7, 0.8, 20)
    assert read(LLAMA, {"do_sample": False, "temperature": 0.7}).generation.temperature == 0.0
    assert read(LLAMA, {}).generation.temperature is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; use one of"),
        ({"architectures": None}, "architecture none"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"logit_scale": 0.5}, "no value but 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope_section"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"factor": 4}},
            "both rope_parameters and rope_scaling",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer type"),
        ({"sliding_window": 128}, "LlamaForCausalLM does not have"),
        ({"head_dim": 15}, "must be even"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 3}, "alike"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            "no sliding window is in use",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 3},
            "full_attention or sliding_attention",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change, words, read):
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        read(LLAMA | change)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_those_fields_are_accepted(read):
    neutral = {
        "quantization_config": None,
        "logit_scale": 1.0,
        "partial_rotary_factor": 1.0,
        "use_mrope": False,
        "rope_interleaved": False,
        "sliding_window": None,
    }
    assert read(LLAMA | neutral) == read(LLAMA)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "'hidden_size' must be a positive integer, not '64'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer"),
        ({"num_hidden_layers": True}, "'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads"),
        ({"num_attention_heads": 6}, "lacks 'head_dim'"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a finite number"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be an object"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1}},
            "lacks 'high_freq_factor'",
        ),
        ({"eos_token_id": "</s>"}, "'eos_token_id' must be a token id"),
    ],
)
def test_a_missing_or_mistyped_field_is_named(change, words, read):
    with pytest.raises(CheckpointError, match=words) as caught:
        read(LLAMA | change)
    assert "config.json" in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        ModelConfig.from_folder(tmp_path)
