"""What a checkpoint's config.json says, checked and in one shape for every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import ModelError, UnsupportedModelError
from models.families import bloom, llama, mpt, sparse_transformer
from models.fields import Fields
from models.generation import GenerationDefaults

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from models.rope_parameters import RopeParameters

_FAMILIES: Mapping[str, Callable[[Fields, str], Mapping[str, Any]]] = {
    "LlamaForCausalLM": llama.read,
    "MistralForCausalLM": llama.read,
    "Qwen2ForCausalLM": llama.read,
    "Qwen3ForCausalLM": llama.read,
    "BloomForCausalLM": bloom.read,
    "MptForCausalLM": mpt.read,
    sparse_transformer.ARCHITECTURE: sparse_transformer.read,
}
ARCHITECTURES = tuple(_FAMILIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder and the limits it was trained for.

    Attributes:
        architecture: the class in transformers that this decoder reproduces, or our own.
        vocab_size: rows of the embedding, padding rows included.
        hidden_size: size of the residual stream.
        intermediate_size: inner size of the feed-forward part.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        head_dim: size of one head.
        norm_eps: epsilon of the norms.
        rope: rotary parameters; None where nothing is rotated.
        max_position: tokens that the model was trained for, by its file.
        tied: the output layer is the embedding.
        qkv_bias, output_bias, mlp_bias: which projections have a bias.
        qk_norm: queries and keys are normalised per head before the rotation.
        windows: keys a token sees in each layer, itself included; None for all.
        bos_ids, eos_ids: tokens that begin and end a text, most authoritative first.
        dtype: name of the dtype that config.json states, for example "bfloat16".
        generation: proposed sampling values.
        norm: root mean square norms or layer norms.
        norm_bias: layer norms have a bias.
        activation: of the feed-forward part; all but "swiglu" stand between two projections.
        embedding_norm: the embedding goes through a norm of its own.
        slopes: of each query head under ALiBi; None without.
        clip_qkv: magnitude beyond which queries, keys and values are cut off; None: nowhere.
        position_shape: the grid of learned positions (`models.positions`); empty without.
        patterns: of each layer and KV head, the pattern that is the model's own attention
            (`kernels.patterns`); None where heads see everything.
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
    rope: RopeParameters | None
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
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    activation: Literal["swiglu", "gelu", "gelu_tanh", "quick_gelu"] = "swiglu"
    embedding_norm: bool = False
    slopes: tuple[float, ...] | None = None
    clip_qkv: float | None = None
    position_shape: tuple[int, ...] = ()
    patterns: tuple[tuple[str, ...], ...] | None = None

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
        return ModelConfig.parse(config, generation)

    @staticmethod
    def parse(config: Fields, generation: Fields) -> ModelConfig:
        """The same from what config.json and generation_config.json hold, which may be nothing."""
        architecture = _architecture(config)
        return ModelConfig(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            **_FAMILIES[architecture](config, architecture),
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
        if self.rope is not None and self.rope.kind == "yarn":
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
        if requested <= limit or self.slopes is not None:
            return requested  # ALiBi was made to run beyond its training's length
        if self.rope is not None and self.rope.kind == "dynamic":
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
    if config.maybe_text("model_type") == sparse_transformer.MODEL_TYPE:
        return sparse_transformer.ARCHITECTURE
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
    return names[0]


def _union(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of all groups, each once, in order."""
    return tuple(dict.fromkeys(token for group in groups for token in group))
