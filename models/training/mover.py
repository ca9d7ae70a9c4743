"""Batches on their way from the host's memory to the device's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from models.training.batches import Batch


@dataclass(frozen=True, slots=True)
class Moved:
    """A batch on the device."""

    batch: Batch
    tokens: Tensor  # int64 [rows, length + 1]
    kinds: Tensor  # uint8 [rows, length + 1]
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """What the current stream does next comes after the copy."""
        if self.copied is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self.copied)
        self.tokens.record_stream(stream)
        self.kinds.record_stream(stream)


class Mover:
    """Copies to one device, off its main stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Moved:
        """Host arrays to device tensors; runs in the loader's thread."""
        tokens = torch.from_numpy(batch.tokens.astype(np.int32))
        kinds = torch.from_numpy(batch.kinds)
        if self._copies is None:
            return Moved(batch, tokens.long(), kinds, None)
        # A thread begins on the first GPU, whichever is this process's.
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            tokens = tokens.pin_memory().to(self._device, non_blocking=True).long()
            kinds = kinds.pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._copies)
        return Moved(batch, tokens, kinds, copied)
