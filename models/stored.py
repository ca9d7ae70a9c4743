"""The tensors of a checkpoint's files, known by their headers and read one at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from models.errors import CheckpointError
from models.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from models.names import Cut

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Names of the safetensors format.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the checkpoint, as its file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut | None = None  # the rows that are meant; None: all

    def of(self, cut: Cut | None) -> Stored:
        """A part of this tensor."""
        return self if cut is None else replace(self, shape=cut.shape(self.shape), cut=cut)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
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


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, from the headers of its files."""
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    weight_map = Fields.read(folder / INDEX).maybe_object("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{folder / INDEX} lacks 'weight_map'; fetch the file again.")
    stored: dict[str, Stored] = {}
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


def _header(file: Path) -> dict[str, Stored]:
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
                stored[name] = Stored(file, name, tuple(view.get_shape()), _DTYPES[code])
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


def check_names(
    folder: Path,
    wanted: Collection[str],
    stored: Mapping[str, Stored],
    hints: Mapping[str, str],
) -> None:
    """Whether every tensor is there.

    Args:
        folder: the checkpoint's.
        wanted: names that the model needs.
        stored: what there is.
        hints: what to do where one tensor, by its name, is all that is missing.

    Raises:
        CheckpointError: some are missing.
    """
    missing = [name for name in wanted if name not in stored]
    if missing:
        hint = "fetch the checkpoint again"
        if len(missing) == 1:
            hint = hints.get(missing[0], hint)
        raise CheckpointError(
            f"{folder} lacks the tensor {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; {hint}."
        )


def check_shapes(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]) -> None:
    """Whether the tensors have the shapes that config.json asks for.

    Raises:
        CheckpointError: one has not.
    """
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name].file}: the tensor {stored[name].name!r} has the shape "
                f"{list(stored[name].shape)}{'' if stored[name].cut is None else ' in each third'},"
                f" but config.json asks for {list(shape)}; use the files of one checkpoint."
            )


def check_unused(unused: Sequence[str], stored: Mapping[str, Stored], architecture: str) -> None:
    """Refuse tensors that the model does not know.

    Raises:
        CheckpointError: there are some.
    """
    if unused:
        raise CheckpointError(
            f"{stored[unused[0]].file} holds the tensor {unused[0]!r}"
            f"{f' and {len(unused) - 1} more' if len(unused) > 1 else ''}, for which "
            f"{architecture} with this config.json has no use; without it the answers would "
            "be wrong, so correct config.json or use another checkpoint."
        )
