"""Bloom: what its config.json says, and how its files name and lay out their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.alibi import slopes
from models.families.common import heads_of_their_own, refuse_unknown_computation
from models.names import Names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.fields import Fields

TRAINED = 2048
"""Tokens of a sequence in training; files of today do not say."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
}

NAMES = Names(
    prefix="transformer.",  # the oldest files do without
    layer="h",
    outer={
        "embed_tokens": "word_embeddings",
        "embedding_norm": "word_embeddings_layernorm",
        "norm": "ln_f",
    },
    inner={
        "input_layernorm": "input_layernorm",
        "self_attn.o_proj": "self_attention.dense",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    qkv="self_attention.query_key_value",
    by_head=True,
)


def read(config: Fields, _architecture: str) -> Mapping[str, Any]:
    """The fields of `models.config.ModelConfig` that the family decides.

    Raises:
        CheckpointError: when a field is missing or of a wrong type.
        UnsupportedModelError: when the decoder would not compute what the checkpoint needs.
    """
    refuse_unknown_computation(config, _NEUTRAL)
    hidden = config.integer("hidden_size", config.maybe_integer("n_embed"))
    heads = config.integer("n_head", config.maybe_integer("num_attention_heads"))
    layers = config.integer("n_layer", config.maybe_integer("num_hidden_layers"))
    return heads_of_their_own(
        config, ("hidden_size", hidden), ("n_head", heads), layers, biased=True
    ) | {
        "intermediate_size": 4 * hidden,
        "norm_eps": config.positive("layer_norm_epsilon", 1e-5),
        "max_position": config.integer("seq_length", TRAINED),
        "tied": config.flag("tie_word_embeddings", True),
        "activation": "gelu_tanh",
        "embedding_norm": True,
        "slopes": slopes(heads),
    }
