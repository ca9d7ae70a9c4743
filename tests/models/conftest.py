"""Tiny random checkpoints, made by transformers."""

from __future__ import annotations

import pytest
import torch

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # large enough for attention to be far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def make(architecture, folder, dtype=torch.float32, shard_size="5GB", seed=0, **changes):
    """Save a checkpoint whose biases and norms are random too, and return its oracle."""
    import transformers

    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    config = config_class(**(BASE | changes), attn_implementation="eager")
    torch.manual_seed(seed)
    oracle = getattr(transformers, architecture)(config).eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif parameter.dim() == 1:
            parameter.normal_(0.0, 0.3)
    oracle = oracle.to(dtype)
    oracle.save_pretrained(folder, max_shard_size=shard_size)
    return oracle


@pytest.fixture
def tiny_checkpoint():
    return make
