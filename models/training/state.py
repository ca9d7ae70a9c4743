"""The state of an unfinished run, in files of at most 16 MiB.

Float32 weights are kept exactly. Muon's momentum is kept as int8 with a scale a row and Adam's
moments as bfloat16: the next steps overwrite them soon, and so the whole of a 12M-parameter run is
about 63 MiB instead of 105, small enough to carry between machines.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.training.errors import TrainingError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE = 16 * 2**20  # bytes
_HEADER = 64 * 2**10  # bytes of a file left for the safetensors header
_INDEX = "state.json"


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are stored: momentum as int8 and scales, Adam's moments as bfloat16."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if name.startswith("muon."):
            scale = value.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127  # [..., 1]
            packed[f"{name}:int8"] = (value / scale).round().to(torch.int8)
            packed[f"{name}:scale"] = scale
        else:
            packed[name] = value.to(torch.bfloat16) if name.startswith("adam.") else value
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors from `pack`."""
    tensors: dict[str, Tensor] = {}
    for name, value in packed.items():
        base, _, form = name.partition(":")
        if form == "int8":
            tensors[base] = value.float() * packed[f"{base}:scale"]
        elif not form:
            tensors[name] = value.float()
    return tensors


def save_state(
    folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any], *, max_file: int = MAX_FILE
) -> None:
    """Writes shards, then the index that names them, then removes the shards of the save before.

    `facts` are the run's numbers (JSON). A tensor may be cut between two files. A crash at any
    point leaves the save before intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = max_file - _HEADER
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    layout: dict[str, dict[str, Any]] = {}
    for name, tensor in pack(tensors).items():
        flat = tensor.contiguous().view(-1)
        layout[name] = {"shape": list(tensor.shape), "parts": []}
        start = 0
        while start < flat.numel():
            if room - used < 4096:
                shards.append({})
                used = 0
            count = min((room - used) // flat.element_size(), flat.numel() - start)
            part = f"{name}@{start}"
            shards[-1][part] = flat[start : start + count].clone()
            layout[name]["parts"].append([len(shards) - 1, part])
            used += count * flat.element_size()
            start += count
    files = [f"state-{facts['step']:06d}-{number}.safetensors" for number in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    index = folder / f"{_INDEX}.new"
    index.write_text(json.dumps({"facts": facts, "files": files, "tensors": layout}), "utf-8")
    index.replace(folder / _INDEX)
    for old in folder.glob("state-*.safetensors"):
        if old.name not in files:
            old.unlink()


def has_state(folder: Path) -> bool:
    """Whether a run has saved anything there."""
    return (folder / _INDEX).exists()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors in float32 and facts of the last save; None where there is none.

    Raises:
        TrainingError: a file of the save is missing or damaged.
    """
    if not has_state(folder):
        return None
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        flat: dict[str, Tensor] = {}
        for file in index["files"]:
            with safe_open(folder / file, framework="pt") as shard:
                flat |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        packed = {
            name: torch.cat([flat[part] for _, part in entry["parts"]]).view(entry["shape"])
            for name, entry in index["tensors"].items()
        }
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"The training state in {folder} cannot be read ({error}): restore its files or start "
            "again in an empty folder."
        ) from error
    return unpack(packed), index["facts"]
