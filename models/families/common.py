"""What the config.json of every family is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.fields import Fields

# Fields that change what a model computes and that this decoder does not know: any value but the
# ones listed (or none at all) would give wrong logits without a word.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "alibi": (False,),
    "use_mrope": (False,),
    "dual_chunk_attention_config": (),
    "is_causal": (True,),
    "num_experts": (0,),
    "num_local_experts": (0,),
}


def refuse_unknown_computation(
    config: Fields, more: Mapping[str, tuple[object, ...]] | None = None
) -> None:
    """Refuse what would change the logits without a word.

    Args:
        config: what a checkpoint says.
        more: fields of one family, with the values that change nothing; none or null always may be.

    Raises:
        UnsupportedModelError: naming the field.
    """
    for name, neutral in (_NEUTRAL | dict(more or {})).items():
        value = config.values.get(name)
        if value is not None and value not in neutral:
            allowed = f" but {neutral[0]!r}" if neutral else ""
            raise UnsupportedModelError(
                f"{config.source} sets {name}, and no value{allowed} is supported for it; "
                "use a checkpoint that does without."
            )


def heads_of_their_own(
    config: Fields, hidden: tuple[str, int], heads: tuple[str, int], layers: int, *, biased: bool
) -> dict[str, Any]:
    """What decoders without rotary positions have alike: layer norms, a KV head for every head.

    Args:
        config: what a checkpoint says.
        hidden: its field of the width, and the width.
        heads: likewise of the heads.
        layers: how many.
        biased: whether every product and norm has a bias, or none has.

    Returns:
        Fields of `models.config.ModelConfig`.

    Raises:
        CheckpointError: when the heads do not share the width evenly.
    """
    name, width = hidden
    if width % heads[1]:
        raise config.wrong(heads[0], f"a divisor of {name} ({width})")
    return {
        "hidden_size": width,
        "layers": layers,
        "heads": heads[1],
        "kv_heads": heads[1],
        "head_dim": width // heads[1],
        "rope": None,
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": biased,
        "qk_norm": False,
        "windows": (None,) * layers,
        "norm": "layer",
        "norm_bias": biased,
    }
