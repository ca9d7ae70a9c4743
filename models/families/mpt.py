"""MPT: what its config.json says, and how its files name and lay out their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.alibi import slopes
from models.errors import UnsupportedModelError
from models.families.common import heads_of_their_own, refuse_unknown_computation
from models.fields import Fields
from models.names import Names

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "no_bias": (True,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
}
_NEUTRAL_ATTENTION: Mapping[str, tuple[object, ...]] = {
    "alibi": (True,),
    "attn_type": ("multihead_attention",),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "softmax_scale": (),
}

NAMES = Names(
    prefix="transformer.",
    layer="blocks",
    outer={"embed_tokens": "wte", "norm": "norm_f"},
    inner={
        "input_layernorm": "norm_1",
        "self_attn.o_proj": "attn.out_proj",
        "post_attention_layernorm": "norm_2",
        "mlp.up_proj": "ffn.up_proj",
        "mlp.down_proj": "ffn.down_proj",
    },
    qkv="attn.Wqkv",
    by_head=False,
)


def read(config: Fields, _architecture: str) -> Mapping[str, Any]:
    """The fields of `models.config.ModelConfig` that the family decides.

    Raises:
        CheckpointError: when a field is missing or of a wrong type.
        UnsupportedModelError: when the decoder would not compute what the checkpoint needs.
    """
    refuse_unknown_computation(config, _NEUTRAL)
    attention = config.maybe_object("attn_config") or Fields({}, f"{config.source}: attn_config")
    if not attention.flag("alibi", True):
        raise UnsupportedModelError(
            f"{config.source}: attn_config sets alibi to false; only MPT with ALiBi is supported."
        )
    refuse_unknown_computation(attention, _NEUTRAL_ATTENTION)
    hidden, heads = config.integer("d_model"), config.integer("n_heads")
    layers = config.integer("n_layers")
    clip = attention.maybe_number("clip_qkv")
    return heads_of_their_own(
        config, ("d_model", hidden), ("n_heads", heads), layers, biased=False
    ) | {
        # transformers reads `expansion_ratio` and leaves it alone.
        "intermediate_size": 4 * hidden,
        "norm_eps": config.positive("layer_norm_epsilon", 1e-5),
        "max_position": config.integer("max_seq_len", 2048),
        "tied": config.flag("tie_word_embeddings", True),
        "activation": "gelu",
        "slopes": slopes(heads, attention.positive("alibi_bias_max", 8.0)),
        "clip_qkv": clip or None,  # 0 clips nothing
    }
