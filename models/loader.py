"""Loads a checkpoint folder, one tensor at a time from the file to where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from kernels.attention import Impl
from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError, ModelError
from models.families import bloom, mpt
from models.names import Source
from models.stored import check_names, check_shapes, check_unused, tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from models.names import Names
    from models.stored import Stored

TIE_HINT = "if the output layer is the embedding, set tie_word_embeddings in config.json"

# Of the families that do not share Llama's names.
_NAMES: Mapping[str, Names] = {"BloomForCausalLM": bloom.NAMES, "MptForCausalLM": mpt.NAMES}
_NAMED_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load(
    path: str | Path,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    load_format: Literal["safetensors", "dummy"] = "safetensors",
) -> tuple[Decoder, ModelConfig]:
    """A decoder with its weights, ready to run.

    Peak memory is the weights in `dtype` plus one tensor as the file stores it.

    Args:
        path: folder in Hugging Face's layout.
        dtype: "auto", "float64", "float32", "float16" or "bfloat16". "auto" is the checkpoint's
            own dtype on an accelerator; on a CPU it is bfloat16 where the checkpoint has 16 bits
            and the CPU computes with them, else float32.
        device: where the model runs.
        load_format: "dummy" needs config.json alone and fills in small random weights, the same
            at every call, to measure large shapes.

    Raises:
        CheckpointError: when files or tensors are missing, damaged, or not what config.json says.
        UnsupportedModelError: when the decoder would not compute what the checkpoint needs.
        ModelError: when `dtype` or `device` cannot be had.
    """
    folder = Path(path)
    place = usable_device(device)
    config = ModelConfig.from_folder(folder)
    if load_format == "dummy":
        return dummy(config, resolve_dtype(dtype, config.dtype, place), place), config

    held = tensors(folder)
    wanted = dict(Decoder(config, torch.float32, "meta").named_parameters())
    stored = _stored(folder, config, wanted, held)
    source = config.dtype or str(stored["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    decoder = _decoder(config, resolve_dtype(dtype, source, place), place)
    parameters = dict(decoder.named_parameters())
    total = sum(stored[name].bytes for name in parameters)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights") as progress:
        # File order, so that a spinning disk or a network share reads straight through.
        for name in sorted(parameters, key=lambda name: (str(stored[name].file), name)):
            parameters[name].copy_(stored[name].read())
            progress.update(stored[name].bytes)
    if config.tied and "lm_head.weight" in held:
        _check_tie(parameters["model.embed_tokens.weight"], held["lm_head.weight"])
    return decoder, config


def dummy(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder with small random weights, the same at every call, to measure large shapes."""
    decoder = _decoder(config, dtype, device)
    parameters = dict(decoder.named_parameters())
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in tqdm(parameters.items(), unit="tensor", desc="Making weights"):
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.uniform_(-0.03, 0.03, generator=generator)
    return decoder


def resolve_dtype(dtype: str, checkpoint: str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    Args:
        dtype: "auto" or the name of a dtype.
        checkpoint: the dtype that the checkpoint is stored in, if it says.
        device: where the model runs.

    Raises:
        ModelError: when a name is not one of a supported dtype.
    """
    if dtype != "auto":
        return _named_dtype(dtype)
    own = _named_dtype(checkpoint or "float32")
    if device.type != "cpu":
        return own
    if own.itemsize == 2 and _cpu_computes_bfloat16():
        return torch.bfloat16
    return torch.float32


def _named_dtype(name: str) -> torch.dtype:
    if name not in _NAMED_DTYPES:
        raise ModelError(f"The dtype {name!r} is not supported; use {', '.join(_NAMED_DTYPES)}.")
    return _NAMED_DTYPES[name]


def _cpu_computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent before torch 2.13
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def usable_device(device: torch.device | str) -> torch.device:
    """The device of a name.

    Raises:
        ModelError: there is no such device here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"The device {str(device)!r} cannot be used ({reason}); choose another, such as cpu."
        ) from error
    return place


def _stored(
    folder: Path,
    config: ModelConfig,
    wanted: Mapping[str, Tensor],
    held: Mapping[str, Stored],
) -> dict[str, Stored]:
    """Where each parameter is stored; names and shapes are checked before any memory is taken."""
    names = _NAMES.get(config.architecture)
    sources = {
        name: Source(name) if names is None else names.source(name, config.heads, held)
        for name in wanted
    }
    used = dict.fromkeys(source.name for source in sources.values())
    check_names(folder, used, held, {"lm_head.weight": TIE_HINT})
    stored = {name: held[source.name].of(source.cut) for name, source in sources.items()}
    check_shapes({name: tuple(part.shape) for name, part in wanted.items()}, stored)
    unused = [name for name in held if name not in used and not _may_be_ignored(name, config)]
    check_unused(unused, held, config.architecture)
    return stored


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that old files hold and that follow from the rest."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def _check_tie(embedding: Tensor, head: Stored) -> None:
    stored = head.read().to(embedding.device, embedding.dtype)
    if stored.shape != embedding.shape or not torch.equal(stored, embedding):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from the embedding, although config.json ties "
            "them; set tie_word_embeddings to false."
        )


def _decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    impl = Impl.of(device, dtype, config.head_dim, config.heads // config.kv_heads)
    return Decoder(config, dtype, device, impl)
