"""Bloom: what its config.json says, and how its files name and lay out their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.alibi import slopes
from models.families.common import refuse_unknown_computation
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
    if hidden % heads:
        raise config.wrong("n_head", f"a divisor of hidden_size ({hidden})")
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "norm_eps": config.positive("layer_norm_epsilon", 1e-5),
        "rope": None,
        "max_position": config.integer("seq_length", TRAINED),
        "tied": config.flag("tie_word_embeddings", True),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "windows": (None,) * layers,
        "norm": "layer",
        "norm_bias": True,
        "activation": "gelu_tanh",
        "embedding_norm": True,
        "slopes": slopes(heads),
    }
