"""What a checkpoint's config.json says, checked and in one shape for every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelError, UnsupportedModelError
from models.fields import Fields
from models.generation import GenerationDefaults
from models.rope_parameters import RopeParameters

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

# Transformers' defaults where config.json leaves a field out.
_MAX_POSITION = {
    "LlamaForCausalLM": 2048,
    "MistralForCausalLM": 131_072,
    "Qwen2ForCausalLM": 32_768,
    "Qwen3ForCausalLM": 32_768,
}
_QWEN_MAX_WINDOW_LAYERS = 28
_DEFAULT_WINDOW = 4096

# Fields that change what a model computes and that this decoder does not know: any value but the
# ones listed (or none at all) would give wrong logits without a word.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder and the limits it was trained for.

    Attributes:
        architecture: the class in transformers that this decoder reproduces.
        vocab_size: rows of the embedding, padding rows included.
        hidden_size: size of the residual stream.
        intermediate_size: inner size of the feed-forward part.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        head_dim: size of one head.
        norm_eps: epsilon of the RMS norms.
        rope: rotary parameters.
        max_position: max_position_embeddings.
        tied: the output layer is the embedding.
        qkv_bias, output_bias, mlp_bias: which projections have a bias.
        qk_norm: queries and keys are normalised per head before the rotation.
        windows: keys a token sees in each layer, itself included; None for all.
        bos_ids, eos_ids: tokens that begin and end a text, most authoritative first.
        dtype: name of the dtype that config.json states, for example "bfloat16".
        generation: proposed sampling values.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeParameters
    max_position: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    dtype: str | None
    generation: GenerationDefaults

    @staticmethod
    def from_folder(path: str | Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json.

        Raises:
            CheckpointError: when a file is missing or a field is missing or of a wrong type.
            UnsupportedModelError: when the decoder would not compute what the checkpoint needs.
        """
        folder = Path(path)
        config = Fields.read(folder / "config.json")
        extra = folder / "generation_config.json"
        generation = Fields.read(extra) if extra.exists() else Fields({}, str(extra))
        architecture = _architecture(config)
        _refuse_unknown_computation(config)

        llama, qwen3 = architecture == "LlamaForCausalLM", architecture == "Qwen3ForCausalLM"
        bias = config.flag("attention_bias", False)
        max_position = config.integer("max_position_embeddings", _MAX_POSITION[architecture])
        layers = config.integer("num_hidden_layers")
        return ModelConfig(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=config.integer("hidden_size"),
            intermediate_size=config.integer("intermediate_size"),
            layers=layers,
            **_heads(config, architecture),
            norm_eps=config.positive("rms_norm_eps", 1e-6),
            rope=RopeParameters.parse(config, max_position),
            max_position=max_position,
            tied=config.flag("tie_word_embeddings", False),
            qkv_bias=architecture == "Qwen2ForCausalLM" or ((llama or qwen3) and bias),
            output_bias=(llama or qwen3) and bias,
            mlp_bias=llama and config.flag("mlp_bias", False),
            qk_norm=qwen3,
            windows=_windows(config, architecture, layers),
            bos_ids=_union(generation.token_ids("bos_token_id"), config.token_ids("bos_token_id")),
            eos_ids=_union(generation.token_ids("eos_token_id"), config.token_ids("eos_token_id")),
            dtype=config.maybe_text("dtype") or config.maybe_text("torch_dtype"),
            generation=GenerationDefaults.parse(generation),
        )

    @property
    def max_model_len(self) -> int:
        """Most tokens a sequence may have: the length that the rotary embedding was made for.

        `max_position_embeddings`, except under yarn, whose files state the length before scaling:
        there it is the original length times the factor. Linear scaling is not multiplied: some
        files state the length before and some after scaling, and only the smaller is safe.
        """
        if self.rope.kind == "yarn":
            return int(self.rope.original_max_position * self.rope.factor)
        return self.max_position

    def resolve_max_model_len(self, requested: int | None) -> int:
        """The length limit to serve with.

        Args:
            requested: tokens, or None for the checkpoint's own limit.

        Raises:
            ModelError: when more is requested than the checkpoint supports.
        """
        limit = self.max_model_len
        if requested is None:
            return limit
        if requested <= 0:
            raise ModelError(f"The maximum length must be at least 1 token, not {requested}.")
        if requested <= limit:
            return requested
        if self.rope.kind == "dynamic":
            raise UnsupportedModelError(
                f"A maximum length of {requested} tokens exceeds the {limit} up to which dynamic "
                "rotary scaling leaves the frequencies alone: beyond it they change with the "
                "length, but cached keys are already rotated; ask for at most "
                f"{limit} tokens, or give the checkpoint yarn scaling."
            )
        raise ModelError(
            f"A maximum length of {requested} tokens exceeds the {limit} that config.json allows; "
            "ask for less, or raise max_position_embeddings if the model was trained for more."
        )


def _architecture(config: Fields) -> str:
    names = config.maybe_texts("architectures") or ()
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{config.source}: architecture {' + '.join(names) or 'none'} is not supported; "
            f"use one of {', '.join(ARCHITECTURES)}."
        )
    remote = config.maybe_object("auto_map")
    if remote and "AutoModelForCausalLM" in remote.values:
        raise UnsupportedModelError(
            f"{config.source} names model code of its own in auto_map, which is never run; "
            "use a checkpoint of a standard architecture."
        )
    activation = config.maybe_text("hidden_act") or "silu"
    if activation != "silu":
        raise UnsupportedModelError(
            f"{config.source}: hidden_act {activation!r} is not supported; only silu is."
        )
    return names[0]


def _refuse_unknown_computation(config: Fields) -> None:
    for name, neutral in _NEUTRAL.items():
        value = config.values.get(name)
        if value is not None and value not in neutral:
            allowed = f" but {neutral[0]!r}" if neutral else ""
            raise UnsupportedModelError(
                f"{config.source} sets {name}, and no value{allowed} is supported for it; "
                "use a checkpoint that does without."
            )


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


def _union(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of all groups, each once, in order."""
    return tuple(dict.fromkeys(token for group in groups for token in group))
