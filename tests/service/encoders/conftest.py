"""Tiny random encoders with bytes as tokens, and applications over them."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
FAMILIES = {
    "Longformer": {"attention_window": 32, "max_position_embeddings": 602, "type_vocab_size": 1},
    "BigBird": {"block_size": 16, "num_random_blocks": 1, "max_position_embeddings": 600},
}


def write_tokenizer(folder):
    """Bytes as tokens behind RoBERTa's special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**named, "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>"})
    )


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """Factory of checkpoint folders, each made once."""
    import transformers

    made = {}

    def build(architecture, **changes):
        key = (architecture, *sorted(changes.items()))
        if key not in made:
            family = "Longformer" if architecture.startswith("Longformer") else "BigBird"
            config = getattr(transformers, f"{family}Config")(
                **{
                    "vocab_size": 5 + 256,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "initializer_range": 0.3,
                    "pad_token_id": 1,
                    "sep_token_id": 2,
                    "bos_token_id": 0,
                    "eos_token_id": 2,
                }
                | FAMILIES[family]
                | changes
            )
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(architecture)
            getattr(transformers, architecture)(config).save_pretrained(folder)
            write_tokenizer(folder)
            made[key] = folder
        return made[key]

    return build
