"""Shapes of models that are measured without their weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

from models.config import ModelConfig
from models.families import sparse_transformer
from models.fields import Fields
from models.generation import GenerationDefaults
from models.rope_parameters import RopeParameters
from service.errors import ConfigError

_LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeParameters(
        kind="llama3",
        theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    ),
    max_position=131_072,
    tied=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None,) * 32,
    bos_ids=(),
    eos_ids=(),
    dtype="bfloat16",
    generation=GenerationDefaults(),
)
SHAPES = {
    "llama-3.1-8b": _LLAMA,
    "sparse-transformer": ModelConfig.parse(
        Fields(sparse_transformer.PAPER, "the paper's shape"), Fields({}, "no generation_config")
    ),
    "tiny": replace(
        _LLAMA,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        windows=(None,) * 2,
    ),
}


def shape_of(name: str, layers: int | None = None) -> ModelConfig:
    """The shape of a name, with fewer or more layers if so asked.

    Raises:
        ConfigError: there is no such shape.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape must be one of {', '.join(SHAPES)}, not {name}")
    config = SHAPES[name]
    if layers is None:
        return config
    # A list of patterns repeats over a model's layers.
    own = config.patterns and tuple(islice(cycle(config.patterns), layers))
    return replace(config, layers=layers, windows=(None,) * layers, patterns=own)
