"""Llama, Mistral, Qwen2 and Qwen3: what their config.json says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.errors import UnsupportedModelError
from models.families.common import refuse_unknown_computation
from models.rope_parameters import RopeParameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.fields import Fields

# Transformers' defaults where config.json leaves a field out.
_MAX_POSITION = {
    "LlamaForCausalLM": 2048,
    "MistralForCausalLM": 131_072,
    "Qwen2ForCausalLM": 32_768,
    "Qwen3ForCausalLM": 32_768,
}
_QWEN_MAX_WINDOW_LAYERS = 28
_DEFAULT_WINDOW = 4096


def read(config: Fields, architecture: str) -> Mapping[str, Any]:
    """The fields of `models.config.ModelConfig` that the family decides.

    Raises:
        CheckpointError: when a field is missing or of a wrong type.
        UnsupportedModelError: when the decoder would not compute what the checkpoint needs.
    """
    activation = config.maybe_text("hidden_act") or "silu"
    if activation != "silu":
        raise UnsupportedModelError(
            f"{config.source}: hidden_act {activation!r} is not supported; only silu is."
        )
    refuse_unknown_computation(config)
    llama, qwen3 = architecture == "LlamaForCausalLM", architecture == "Qwen3ForCausalLM"
    bias = config.flag("attention_bias", False)
    max_position = config.integer("max_position_embeddings", _MAX_POSITION[architecture])
    layers = config.integer("num_hidden_layers")
    return {
        "hidden_size": config.integer("hidden_size"),
        "intermediate_size": config.integer("intermediate_size"),
        "layers": layers,
        **_heads(config, architecture),
        "norm_eps": config.positive("rms_norm_eps", 1e-6),
        "rope": RopeParameters.parse(config, max_position),
        "max_position": max_position,
        "tied": config.flag("tie_word_embeddings", False),
        "qkv_bias": architecture == "Qwen2ForCausalLM" or ((llama or qwen3) and bias),
        "output_bias": (llama or qwen3) and bias,
        "mlp_bias": llama and config.flag("mlp_bias", False),
        "qk_norm": qwen3,
        "windows": _windows(config, architecture, layers),
    }


def _heads(config: Fields, architecture: str) -> Mapping[str, Any]:
    heads = config.integer("num_attention_heads")
    # Absent from the oldest Llama files, where it means one KV head per query head.
    kv_heads = config.maybe_integer("num_key_value_heads")
    if kv_heads is None:
        kv_heads = 8 if architecture == "MistralForCausalLM" else heads
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = config.maybe_integer("head_dim")
    if head_dim is None and architecture == "Qwen3ForCausalLM":
        head_dim = 128
    if head_dim is None:
        hidden = config.integer("hidden_size")
        if hidden % heads:
            raise config.wrong("head_dim", "the size of one head, since heads do not divide hidden")
        head_dim = hidden // heads
    if head_dim % 2:
        raise UnsupportedModelError(
            f"{config.source}: heads of {head_dim} channels cannot be rotated in pairs; "
            "head_dim must be even."
        )
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def _windows(config: Fields, architecture: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    types = config.maybe_texts("layer_types")
    if architecture == "LlamaForCausalLM":
        given = config.maybe_integer("sliding_window")
        if given is not None or (types and set(types) != {"full_attention"}):
            raise UnsupportedModelError(
                f"{config.source} sets a sliding window, which LlamaForCausalLM does not have; "
                "use a Mistral or Qwen checkpoint."
            )
        return (None,) * layers

    # A window that is null is no window; one that is left out is transformers' default.
    window: int | None = _DEFAULT_WINDOW
    if "sliding_window" in config.values:
        window = config.maybe_integer("sliding_window")
    if architecture == "MistralForCausalLM":
        expected = "full_attention" if window is None else "sliding_attention"
        if types and set(types) != {expected}:
            raise UnsupportedModelError(
                f"{config.source}: layer_types that differ from layer to layer are not supported "
                "for MistralForCausalLM; all must be alike."
            )
        return (window,) * layers

    if not config.flag("use_sliding_window", False):
        window = None
    if types is None:
        first = config.values.get("max_window_layers", _QWEN_MAX_WINDOW_LAYERS)
        if not isinstance(first, int) or first < 0:
            raise config.wrong("max_window_layers", "a number of layers")
        return tuple(window if layer >= first else None for layer in range(layers))
    sliding = "sliding_attention" in types
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{config.source}: layer_types must name full_attention or sliding_attention for each "
            f"of the {layers} layers."
        )
    if sliding and window is None:
        raise UnsupportedModelError(
            f"{config.source}: layer_types has sliding_attention, but no sliding window is in use; "
            "set use_sliding_window and sliding_window."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
