"""Loads an encoder's checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from models.encoders.config import EncoderConfig
from models.encoders.encoder import Encoder
from models.loader import resolve_dtype, usable_device
from models.stored import check_names, check_shapes, check_unused, tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.encoders.config import RandomAttention
    from models.stored import Stored

TIE_HINT = "if the output layer is the embedding, set tie_word_embeddings in config.json"
# Of old files, and of heads that training had and answers do not need.
IGNORED = (".position_ids", ".token_type_ids", ".seq_relationship.weight", ".seq_relationship.bias")
IGNORED_WITHIN = ("pooler.",)


def load(
    path: str | Path,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    random_attention: RandomAttention = "published",
) -> Encoder:
    """An encoder with its weights, ready to run.

    Args:
        path: folder in Hugging Face's layout.
        dtype: see `models.loader.load`.
        device: where the model runs.
        load_format: "dummy" needs config.json alone and fills in small random weights.
        random_attention: which random blocks BigBird has; see `models.encoders.bigbird`.

    Raises:
        CheckpointError: when files or tensors are missing, damaged, or not what config.json says.
        UnsupportedModelError: when the encoder would not compute what the checkpoint needs.
        ModelError: when `dtype` or `device` cannot be had.
    """
    folder, place = Path(path), usable_device(device)
    config = EncoderConfig.from_folder(folder, random_attention)
    if load_format == "dummy":
        return dummy(config, resolve_dtype(dtype, config.dtype, place), place)
    stored = tensors(folder)
    outline = Encoder(config, torch.float32, "meta")
    shapes = {name: tuple(part.shape) for name, part in outline.named_parameters()}
    names = {name: _found(outline.stored_name(name), stored) for name in shapes}
    weight = outline.stored_name("head.decoder.weight") if config.head == "masked_lm" else ""
    check_names(folder, list(names.values()), stored, {weight: TIE_HINT})
    check_shapes({names[name]: shape for name, shape in shapes.items()}, stored)
    used = {*names.values(), *map(outline.stored_name, names)}
    unused = [name for name in stored if name not in used and not _may_be_ignored(name)]
    check_unused([name for name in unused if name != weight], stored, config.architecture)
    embedding = stored[names["embeddings.word_embeddings.weight"]]
    source = config.dtype or str(embedding.dtype).removeprefix("torch.")
    encoder = Encoder(config, resolve_dtype(dtype, source, place), place)
    parameters = dict(encoder.named_parameters())
    total = sum(stored[name].bytes for name in names.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights") as progress:
        for name in sorted(parameters, key=lambda name: (str(stored[names[name]].file), name)):
            parameters[name].copy_(stored[names[name]].read())
            progress.update(stored[names[name]].bytes)
    return encoder


def dummy(config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> Encoder:
    """An encoder with small random weights, the same at every call, to measure large shapes."""
    encoder = Encoder(config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if name.lower().endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.uniform_(-0.03, 0.03, generator=generator)
    return encoder


def _found(name: str, stored: Mapping[str, Stored]) -> str:
    """The name under which a tensor is stored.

    An output layer's bias has two: tied, a file may hold either; else the layer's own counts.
    """
    twin = _twin(name)
    return twin if twin in stored else name


def _twin(name: str) -> str:
    for bias in ("lm_head.bias", "cls.predictions.bias"):
        if name == bias:
            return bias.removesuffix("bias") + "decoder.bias"
    return name


def _may_be_ignored(name: str) -> bool:
    return name.endswith(IGNORED) or any(part in name for part in IGNORED_WITHIN)
