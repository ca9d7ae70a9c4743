"""What an encoder's config.json says, checked and in one shape for both families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.errors import UnsupportedModelError
from models.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

Family = Literal["longformer", "bigbird"]
Head = Literal["model", "masked_lm", "classification", "question_answering"]
RandomAttention = Literal["published", "transformers_eval"]

HEADS: Mapping[str, Head] = {
    "Model": "model",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForQuestionAnswering": "question_answering",
}
FAMILIES: Mapping[str, Family] = {"Longformer": "longformer", "BigBird": "bigbird"}
ARCHITECTURES = tuple(family + head for family in FAMILIES for head in HEADS)

ACTIVATIONS = ("gelu", "gelu_new", "relu")
# Fields that change what a model computes, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "quantization_config": (),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "autoregressive": (False,),
    "position_embedding_type": ("absolute",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Shape of an encoder and what its layers look at.

    Attributes:
        architecture: the class in transformers that this encoder reproduces.
        family: "longformer" or "bigbird".
        head: what stands on the encoder: "model" is nothing.
        activation: of the feed-forward parts: "gelu", "gelu_new" (its tanh form) or "relu".
        max_position: rows of the table of positions.
        tied: the masked language model's output layer is the embedding.
        qkv_bias: queries, keys and values have a bias.
        rescaled: embeddings are multiplied by the root of their size.
        windows: Longformer's `attention_window` of each layer, both sides together.
        block_size: BigBird's.
        random_blocks: how many blocks BigBird's blocks see at random.
        full: BigBird's `attention_type` is "original_full": every token sees all.
        random_attention: which random blocks BigBird has; see `models.encoders.bigbird`.
        labels: what a classifier tells apart, by number.
        multi_label: of which several may hold, each by a sigmoid.
        regression: or which are numbers that nothing is applied to.
        sep_id, pad_id: tokens that separate texts and that fill them up.
        dtype: name of the dtype that config.json states, for example "bfloat16".
    """

    architecture: str
    family: Family
    head: Head
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    activation: str
    norm_eps: float
    max_position: int
    type_vocab_size: int
    tied: bool
    qkv_bias: bool
    rescaled: bool
    windows: tuple[int, ...]
    block_size: int
    random_blocks: int
    full: bool
    random_attention: RandomAttention
    labels: tuple[str, ...]
    multi_label: bool
    regression: bool
    sep_id: int
    pad_id: int
    dtype: str | None

    @staticmethod
    def is_encoder(path: str | Path) -> bool:
        """Whether a folder's config.json names an encoder.

        Raises:
            CheckpointError: it is missing or no JSON object.
        """
        names = Fields.read(Path(path) / "config.json").values.get("architectures")
        return isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES

    @staticmethod
    def from_folder(
        path: str | Path, random_attention: RandomAttention = "published"
    ) -> EncoderConfig:
        """Read config.json.

        Raises:
            CheckpointError: when the file is missing or a field is missing or of a wrong type.
            UnsupportedModelError: when the encoder would not compute what the checkpoint needs.
        """
        config = Fields.read(Path(path) / "config.json")
        architecture, family, head = _architecture(config)
        _refuse_unknown_computation(config)
        longformer = family == "longformer"
        layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
        hidden = config.integer("hidden_size")
        if hidden % heads:
            raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({heads})")
        activation = config.maybe_text("hidden_act") or ("gelu" if longformer else "gelu_new")
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"{config.source}: hidden_act {activation!r} is not supported; use a checkpoint "
                f"with one of {', '.join(ACTIVATIONS)}."
            )
        problem = config.maybe_text("problem_type")
        attention = config.maybe_text("attention_type") or "block_sparse"
        if attention not in ("block_sparse", "original_full"):
            raise config.wrong("attention_type", "block_sparse or original_full")
        return EncoderConfig(
            architecture=architecture,
            family=family,
            head=head,
            vocab_size=config.integer("vocab_size", 30_522 if longformer else 50_358),
            hidden_size=hidden,
            intermediate_size=config.integer("intermediate_size"),
            layers=layers,
            heads=heads,
            activation=activation,
            norm_eps=config.positive("layer_norm_eps", 1e-12),
            max_position=config.integer("max_position_embeddings", 512 if longformer else 4096),
            type_vocab_size=config.integer("type_vocab_size", 2),
            tied=config.flag("tie_word_embeddings", True),
            qkv_bias=longformer or config.flag("use_bias", True),
            rescaled=not longformer and config.flag("rescale_embeddings", False),
            windows=_windows(config, layers) if longformer else (),
            block_size=config.integer("block_size", 64),
            random_blocks=_count(config, "num_random_blocks", 3),
            full=not longformer and attention == "original_full",
            random_attention=random_attention,
            labels=_labels(config, head),
            multi_label=problem == "multi_label_classification",
            regression=problem == "regression",
            sep_id=_token(config, "sep_token_id", 2 if longformer else 66),
            pad_id=_token(config, "pad_token_id", 1 if longformer else 0),
            dtype=config.maybe_text("dtype") or config.maybe_text("torch_dtype"),
        )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.heads

    @property
    def max_model_len(self) -> int:
        """Most tokens of a text. Longformer's positions begin behind that of padding."""
        if self.family == "longformer":
            return self.max_position - self.pad_id - 1
        return self.max_position

    @property
    def sparse_above(self) -> int:
        """Tokens up to which every token of BigBird sees all, as in transformers."""
        return (5 + 2 * self.random_blocks) * self.block_size


def _architecture(config: Fields) -> tuple[str, Family, Head]:
    names = config.maybe_texts("architectures") or ()
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{config.source}: architecture {' + '.join(names) or 'none'} is no encoder that is "
            f"supported; use one of {', '.join(ARCHITECTURES)}."
        )
    name = names[0]
    family = next(family for family in FAMILIES if name.startswith(family))
    return name, FAMILIES[family], HEADS[name.removeprefix(family)]


def _refuse_unknown_computation(config: Fields) -> None:
    for name, neutral in _NEUTRAL.items():
        value = config.values.get(name)
        if value is not None and value not in neutral:
            raise UnsupportedModelError(
                f"{config.source} sets {name} to {value!r}, which is not supported; use a "
                "checkpoint that does without."
            )
    dilation = config.values.get("attention_dilation")
    if dilation is not None and set(dilation if isinstance(dilation, list) else [dilation]) != {1}:
        raise UnsupportedModelError(
            f"{config.source} sets attention_dilation, which transformers' Longformer does not "
            "have either; use a checkpoint whose windows have no gaps."
        )


def _windows(config: Fields, layers: int) -> tuple[int, ...]:
    value = config.values.get("attention_window", 512)
    windows = value if isinstance(value, list) else [value] * layers
    even = all(type(one) is int and one > 0 and one % 2 == 0 for one in windows)
    if len(windows) != layers or not even:
        raise config.wrong("attention_window", f"an even number, or {layers} of them")
    return tuple(windows)


def _labels(config: Fields, head: Head) -> tuple[str, ...]:
    if head == "question_answering":
        return ("start", "end")
    if head != "classification":
        return ()
    named = config.maybe_object("id2label")
    if named is None:
        return tuple(f"LABEL_{number}" for number in range(config.integer("num_labels", 2)))
    wanted = [str(number) for number in range(len(named.values))]
    if set(named.values) != set(wanted):
        raise config.wrong("id2label", "a label for each number from 0 on")
    return tuple(str(named.values[number]) for number in wanted)


def _count(config: Fields, name: str, default: int) -> int:
    value = config.values.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 0:
        raise config.wrong(name, "a number from 0 on")
    return value


def _token(config: Fields, name: str, default: int) -> int:
    ids = config.token_ids(name)
    return ids[0] if ids else default
