"""A finished checkpoint as the start of a new run: its weights, its tokenizer, its record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from models.training.bpe import SPECIALS
from models.training.checkpoint import configuration, stacked_weights
from models.training.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from models.training.plans import Shape

LOG = "training_log.jsonl"
_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
)


@dataclass(frozen=True, slots=True)
class Start:
    """What a new run takes over."""

    weights: dict[str, Tensor]  # float32, stacked over the layers
    log: str  # of the runs before, "" where there is none
    runs: list[dict[str, Any]]  # before, oldest first: plan, device, tokens_seen, seconds; or None


def read_start(folder: Path, shape: Shape) -> Start:
    """Reads a checkpoint folder as `write_checkpoint` leaves it.

    Raises:
        TrainingError: files are missing or damaged, or the shape is not `shape`.
    """
    try:
        _check_shape(folder, shape)
        named: dict[str, Tensor] = {}
        for file in _weight_files(folder):
            named |= load_file(folder / file)
        log = (folder / LOG).read_text(encoding="utf-8") if (folder / LOG).exists() else ""
        weights = stacked_weights(named, shape.layers)
        return Start(weights, log, _runs(log))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"The checkpoint {folder} cannot be read ({error}): name a whole folder that an "
            "earlier run exported."
        ) from error


def take_weights(parameters: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Copies a start's weights into a model's.

    Raises:
        TrainingError: a tensor has another shape.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise _other_shape(folder, name, list(weights[name].shape), list(parameter.shape))
            parameter.copy_(weights[name])


def blend_weights(
    parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], share: float
) -> None:
    """Moves a model's weights back towards its start's, so that `share` of the change is left."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.lerp_(weights[name].to(parameter.device), 1 - share)


def copy_tokenizer(folder: Path, target: Path, vocab: int) -> None:
    """Copies a checkpoint's tokenizer.json to the file `target`.

    Raises:
        TrainingError: it is missing, or not one that this recipe trained for `vocab` tokens.
    """
    source = folder / "tokenizer.json"
    if not source.exists():
        raise TrainingError(f"{source} is missing: name a folder that an earlier run exported.")
    tokenizer = Tokenizer.from_file(str(source))
    size = tokenizer.get_vocab_size()
    if size > vocab:
        raise _other_shape(folder, "vocabulary", size, vocab)
    if [tokenizer.id_to_token(number) for number in range(len(SPECIALS))] != list(SPECIALS):
        raise TrainingError(
            f"{source} has other special tokens than this recipe's: name a folder that an earlier "
            "run exported."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _check_shape(folder: Path, shape: Shape) -> None:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = configuration(shape, 0, "")
    for key in _SHAPE_KEYS:
        if found.get(key) != expected[key]:
            raise _other_shape(folder, key, found.get(key), expected[key])


def _other_shape(folder: Path, what: str, found: object, expected: object) -> TrainingError:
    return TrainingError(
        f"The checkpoint {folder} has {what} {found}, the plan's shape {expected}: start from "
        "another checkpoint or name another plan."
    )


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _runs(log: str) -> list[dict[str, Any]]:
    """The runs before, from the log: each begins with a line that names its plan."""
    unknown: dict[str, Any] = dict.fromkeys(("plan", "device", "tokens_seen", "seconds"))
    runs: list[dict[str, Any]] = []
    for line in map(json.loads, log.splitlines()):
        if "plan" in line:
            runs.append(unknown | {"plan": line["plan"], "device": line["device"]})
        elif "clock" in line and runs:
            runs[-1] |= {"tokens_seen": line["tokens"], "seconds": line["clock"]}
        elif "blend" in line and runs:
            runs[-1]["blend"] = line["blend"]
    return runs or [unknown]
