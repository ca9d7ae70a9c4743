"""A tiny Llama's configuration."""

from models.config import ModelConfig
from models.generation import GenerationDefaults
from models.rope_parameters import RopeParameters


def tiny_config(**changes):
    fields = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-6,
        "rope": RopeParameters(original_max_position=8192),
        "max_position": 8192,
        "tied": True,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "bos_ids": (),
        "eos_ids": (),
        "dtype": None,
        "generation": GenerationDefaults(),
    } | changes
    return ModelConfig(**({"windows": (None,) * fields["layers"]} | fields))
