"""The Sparse Transformer, in a checkpoint format of our own: Hugging Face has no class for it.

Child et al. 2019, "Generating Long Sequences with Sparse Transformers": a decoder whose heads see
what patterns show them, of pre-activation residual blocks with layer norms, GELU as
x * sigmoid(1.702 x), and learned positions that may be factorised. A folder holds config.json and
safetensors with the decoder's own names (`models.decoder`). Besides what Llama's config.json has,

- `model_type` is "saccade_sparse_transformer";
- `patterns` is a list for the layers of lists for the heads of patterns (`kernels.patterns`), such
  as `[["window:128", "strided:128"]]`: layer i has list i modulo their number, and its head h
  pattern h modulo its length. So `[["window:128"], ["strided:128"]]` interleaves two kinds of
  layers, `[["window:128+strided:128"]]` merges both in every head, and `[["fixed:128,8"]]` is the
  paper's fixed attention;
- `position_shape` is the grid of positions: `[8192]`, the default, has a vector for each,
  `[64, 128]` one for each row and column of the stride, `[32, 32, 3]` for an image's.
"""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from kernels.errors import PatternError
from kernels.patterns.pattern import Pattern
from models.errors import CheckpointError
from models.families.common import heads_of_their_own, refuse_unknown_computation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.fields import Fields

MODEL_TYPE = "saccade_sparse_transformer"
ARCHITECTURE = "SparseTransformerForCausalLM"
_NEUTRAL: Mapping[str, tuple[object, ...]] = {"hidden_act": ("quick_gelu",)}

PAPER: Mapping[str, object] = {
    "model_type": MODEL_TYPE,
    "vocab_size": 256,
    "hidden_size": 1024,
    "num_hidden_layers": 48,  # of the paper's models the one with 16 heads has so many
    "num_attention_heads": 16,
    "max_position_embeddings": 8192,
    "position_shape": [64, 128],
    "patterns": [["window:128", "strided:128"]],
    "dtype": "bfloat16",
}
"""A config.json: bytes, strided attention with a stride and a local context of 128."""


def read(config: Fields, _architecture: str) -> Mapping[str, Any]:
    """The fields of `models.config.ModelConfig` that the family decides.

    Raises:
        CheckpointError: when a field is missing or of a wrong type.
        UnsupportedModelError: when the decoder would not compute what the checkpoint needs.
    """
    refuse_unknown_computation(config, _NEUTRAL)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers = config.integer("num_hidden_layers")
    max_position = config.integer("max_position_embeddings")
    return heads_of_their_own(
        config, ("hidden_size", hidden), ("num_attention_heads", heads), layers, biased=True
    ) | {
        "intermediate_size": config.integer("intermediate_size", 4 * hidden),
        "norm_eps": config.positive("layer_norm_eps", 1e-5),
        "max_position": max_position,
        "tied": config.flag("tie_word_embeddings", False),
        "activation": "quick_gelu",
        "position_shape": _position_shape(config, max_position),
        "patterns": _patterns(config, layers, heads),
    }


def _position_shape(config: Fields, positions: int) -> tuple[int, ...]:
    shape = config.values.get("position_shape", [positions])
    if (
        not isinstance(shape, list)
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
        or math.prod(shape) < positions
    ):
        expected = f"a list of positive integers whose product is at least {positions}"
        raise config.wrong("position_shape", f"{expected}, max_position_embeddings")
    return tuple(shape)


def _patterns(config: Fields, layers: int, heads: int) -> tuple[tuple[str, ...], ...]:
    """The pattern of each layer and head."""
    lists = config.values.get("patterns")
    if (
        not isinstance(lists, list)
        or not lists
        or not all(isinstance(row, list) and row for row in lists)
        or not all(isinstance(text, str) for row in lists for text in row)
    ):
        raise config.wrong("patterns", 'lists of patterns such as [["window:128", "strided:128"]]')
    try:
        named = [[str(Pattern.parse_causal(text)) for text in row] for row in lists]
    except PatternError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointError(f"{config.source}: 'patterns' is wrong: {reason}.") from error
    of_layers = islice(cycle(named), layers)
    return tuple(tuple(islice(cycle(row), heads)) for row in of_layers)
