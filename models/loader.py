"""Loads a checkpoint folder, one tensor at a time from the file to where it is used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from kernels.attention import Impl
from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError, ModelError
from models.families import bloom, mpt
from models.fields import Fields
from models.names import Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from models.names import Cut, Names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Names of the safetensors format.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of the families that do not share Llama's names.
_NAMES: Mapping[str, Names] = {"BloomForCausalLM": bloom.NAMES, "MptForCausalLM": mpt.NAMES}
_NAMED_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the checkpoint, as its file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut | None = None  # the rows that are meant; None: all

    def of(self, cut: Cut | None) -> _Stored:
        """A part of this tensor."""
        return self if cut is None else replace(self, shape=cut.shape(self.shape), cut=cut)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, as a view of the mapped file.

        The file is opened anew for each tensor: pages of a mapping count as this process's memory
        until it is closed, and a whole shard's would add up to the weights a second time.
        """
        try:
            with safe_open(self.file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.file, error) from error
        return tensor if self.cut is None else self.cut.of(tensor)


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

    held = _tensors(folder)
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
        raise ModelError(f"The device {str(device)!r} cannot be used ({reason}).") from error
    return place


def _tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint, from the headers of its files."""
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    weight_map = Fields.read(folder / INDEX).maybe_object("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{folder / INDEX} lacks 'weight_map'; fetch the file again.")
    stored: dict[str, _Stored] = {}
    files = {name: str(shard) for name, shard in weight_map.values.items()}
    for shard in sorted(set(files.values())):
        if not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{folder / INDEX} names the file {shard!r}, which is not in its folder; fetch the "
                "checkpoint again."
            )
        if not (folder / shard).exists():
            raise CheckpointError(
                f"{folder / shard} is missing, but {INDEX} names it; fetch the file."
            )
        stored |= _header(folder / shard)
    for name, shard in files.items():
        if name not in stored or stored[name].file != folder / shard:
            raise CheckpointError(
                f"{folder / shard} lacks the tensor {name!r} that {INDEX} says it holds; "
                "fetch both files again."
            )
    return stored


def _header(file: Path) -> dict[str, _Stored]:
    stored = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (the handle is no mapping)
                view = handle.get_slice(name)
                code = view.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: the tensor {name!r} is stored as {code}; only floating point "
                        "checkpoints of 16 to 64 bits are supported, so use one that is not "
                        "quantised."
                    )
                stored[name] = _Stored(file, name, tuple(view.get_shape()), _DTYPES[code])
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    return stored


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or damaged ({error}); fetch the file again.")


def _no_weights(folder: Path) -> CheckpointError:
    others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if others:
        return CheckpointError(
            f"{folder} has {others[0]} but no {SINGLE}: pickled weights can run code and are never "
            "loaded, only safetensors are; convert the checkpoint with transformers' "
            "save_pretrained."
        )
    return CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}; fetch the weights in safetensors format."
    )


def _stored(
    folder: Path,
    config: ModelConfig,
    wanted: Mapping[str, Tensor],
    held: Mapping[str, _Stored],
) -> dict[str, _Stored]:
    """Where each parameter is stored; names and shapes are checked before any memory is taken."""
    names = _NAMES.get(config.architecture)
    sources = {
        name: Source(name) if names is None else names.source(name, config.heads, held)
        for name in wanted
    }
    missing = [source.name for source in sources.values() if source.name not in held]
    if missing:
        hint = "fetch the checkpoint again"
        if missing == ["lm_head.weight"]:
            hint = "if the output layer is the embedding, set tie_word_embeddings in config.json"
        raise CheckpointError(
            f"{folder} lacks the tensor {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; {hint}."
        )
    stored = {name: held[source.name].of(source.cut) for name, source in sources.items()}
    for name, parameter in wanted.items():
        if stored[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored[name].file}: the tensor {stored[name].name!r} has the shape "
                f"{list(held[stored[name].name].shape)}, but config.json asks for "
                f"{list(parameter.shape)}{'' if stored[name].cut is None else ' in each third'}; "
                "use the files of one checkpoint."
            )
    used = {source.name for source in sources.values()}
    unused = [name for name in held if name not in used and not _may_be_ignored(name, config)]
    if unused:
        raise CheckpointError(
            f"{held[unused[0]].file} holds the tensor {unused[0]!r}"
            f"{f' and {len(unused) - 1} more' if len(unused) > 1 else ''}, for which "
            f"{config.architecture} with this config.json has no use; without it the answers would "
            "be wrong, so correct config.json or use another checkpoint."
        )
    return stored


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that old files hold and that follow from the rest."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def _check_tie(embedding: Tensor, head: _Stored) -> None:
    stored = head.read().to(embedding.device, embedding.dtype)
    if stored.shape != embedding.shape or not torch.equal(stored, embedding):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from the embedding, although config.json ties "
            "them; set tie_word_embeddings to false."
        )


def _decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    impl = Impl.of(device, dtype, config.head_dim, config.heads // config.kv_heads)
    return Decoder(config, dtype, device, impl)
