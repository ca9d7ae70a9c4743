"""Tiny random encoders, made by transformers."""

from __future__ import annotations

import pytest
import torch

SHAPE = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,  # large enough for attention to be far from uniform
    "pad_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
FAMILIES = {
    "Longformer": {"attention_window": [32, 64], "max_position_embeddings": 1500},
    "BigBird": {"block_size": 16, "num_random_blocks": 2, "max_position_embeddings": 1536},
}


@pytest.fixture
def make(tmp_path):
    """Factory of checkpoints whose biases and norms are random too: the oracle and its folder."""
    import transformers

    def build(architecture, **changes):
        family = "Longformer" if architecture.startswith("Longformer") else "BigBird"
        config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES[family] | changes)
        # Dropout stays off where the oracle is in train mode, as for BigBird's random blocks.
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        torch.manual_seed(0)
        oracle = getattr(transformers, architecture)(config).eval()
        with torch.no_grad():
            for parameter in oracle.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / architecture
        oracle.save_pretrained(folder)
        return oracle, folder

    return build
