"""Where a checkpoint's files hold a parameter: under which name, and in which rows of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class Cut:
    """A third of a tensor's rows: queries, keys or values of a fused projection."""

    part: int  # 0 to 2
    groups: int  # the rows are so many groups, and each has its own three parts

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, by the whole tensor's; what does not divide stays, and fits nothing."""
        rows = whole[0] if whole else 0
        return (rows // 3, *whole[1:]) if whole and rows % (3 * self.groups) == 0 else whole

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor [groups * 3 * n, ...]: [groups * n, ...]."""
        parted = whole.view(self.groups, 3, -1, *whole.shape[1:])
        return parted[:, self.part].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Source:
    """What one parameter is filled with."""

    name: str  # of the tensor
    cut: Cut | None = None  # None: all of it


@dataclass(frozen=True, slots=True)
class Names:
    """How a family that does not share Llama's names names its tensors.

    Attributes:
        prefix: of all names but the output layer's; files may leave it out.
        layer: of the list of layers.
        outer: by the name under `model`, of modules outside the layers.
        inner: by the name in a layer, of its modules.
        qkv: in a layer, the fused projection of queries, keys and values.
        by_head: the fused projection has one head's three parts behind the other's; else all
            queries come first, then all keys.
    """

    prefix: str
    layer: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]
    qkv: str
    by_head: bool

    def source(self, parameter: str, heads: int, stored: Iterable[str]) -> Source:
        """Where a file that has the tensors `stored` holds one of the decoder's parameters."""
        module, _, kind = parameter.rpartition(".")
        if not module.startswith("model."):
            return Source(parameter)
        prefix = self.prefix if any(name.startswith(self.prefix) for name in stored) else ""
        module = module.removeprefix("model.")
        if not module.startswith("layers."):
            return Source(f"{prefix}{self.outer[module]}.{kind}")
        _, number, inner = module.split(".", 2)
        place = f"{prefix}{self.layer}.{number}."
        if inner in _QKV:
            cut = Cut(_QKV.index(inner), heads if self.by_head else 1)
            return Source(f"{place}{self.qkv}.{kind}", cut)
        return Source(f"{place}{self.inner[inner]}.{kind}")
