"""Writes a trained model as a Hugging Face Llama folder, with its model card."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from models.training.bpe import BOS_ID, END_ID, EOS_ID, PAD_ID, save_tokenizer
from models.training.filler import prose
from models.training.model_card import model_card
from models.training.tasks import held_out_key, magic_number, needle_document

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from models.training.plans import Shape

_LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def hugging_face_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights under Hugging Face's names; stacked ones are split by layer. Embeddings are tied."""
    named = {
        "model.embed_tokens.weight": weights["embed"],
        "model.norm.weight": weights["final_norm"],
    }
    for ours, theirs in _LAYER_NAMES.items():
        for layer, weight in enumerate(weights[ours].unbind(0)):
            named[f"model.layers.{layer}.{theirs}.weight"] = weight
    return {k: v.detach().to("cpu", dtype).contiguous().clone() for k, v in named.items()}


def stacked_weights(named: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of `hugging_face_weights`: float32, stacked over the layers.

    Raises:
        KeyError: a tensor is missing; RuntimeError: layers differ in shape.
    """
    weights = {
        "embed": named["model.embed_tokens.weight"],
        "final_norm": named["model.norm.weight"],
    }
    for ours, theirs in _LAYER_NAMES.items():
        weights[ours] = torch.stack(
            [named[f"model.layers.{layer}.{theirs}.weight"] for layer in range(layers)]
        )
    return {name: weight.float() for name, weight in weights.items()}


def configuration(shape: Shape, max_length: int, dtype: str) -> dict[str, Any]:
    """`config.json` of `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_ID],
        "pad_token_id": PAD_ID,
        "torch_dtype": dtype,
    }


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    shape: Shape,
    *,
    tokenizer: Path,
    log: Path,
    facts: Mapping[str, Any],
    max_length: int,
    max_shard: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes weights, configuration, tokenizer, training record and model card.

    With `max_shard` (bytes) the weights are spread over files of at most that size with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    named = hugging_face_weights(weights, dtype)
    _write_weights(folder, named, max_shard)
    dtype_name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", configuration(shape, max_length, dtype_name))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, END_ID], "pad_token_id": PAD_ID},
    )
    encoder = Tokenizer.from_file(str(tokenizer))
    save_tokenizer(encoder, folder, max_length)
    _write_json(folder / "example_request.json", example_request(folder.name, encoder, max_length))
    if log.exists():
        shutil.copyfile(log, folder / "training_log.jsonl")
    size = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    card = model_card(shape, facts, max_length=max_length, weight_bytes=size)
    (folder / "README.md").write_text(card, encoding="utf-8")


def example_request(model: str, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """A chat request over a long document with one fact in it, to try the model with.

    `metadata`, which OpenAI's API has for the caller's own use, holds the right answer.
    """
    rng = np.random.default_rng(0)
    tokens = min(8192, max_length // 2)
    document = needle_document(
        prose(3, 8 * tokens, held_out=True),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokens=tokens,
        depth=0.37,
        key=held_out_key(rng),
        value=magic_number(rng),
    )
    return {
        "model": model,
        "messages": [{"role": "user", "content": document.user_message}],
        "temperature": 0,
        "max_tokens": 48,
        "metadata": {"answer": document.value},
    }


def _write_weights(folder: Path, named: dict[str, Tensor], max_shard: int | None) -> None:
    metadata = {"format": "pt"}
    if max_shard is None:
        save_file(named, folder / "model.safetensors", metadata)
        return
    room = max_shard - 64 * 2**10  # the header's share
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in named.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > room:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata)
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
