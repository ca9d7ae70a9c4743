"""Flags as the bits of int64 words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

WORD = 64


def packed(flags: Tensor) -> Tensor:
    """bool [..., n] as int64 [..., ceil(n / 64)]: flag i is bit i % 64 of word i // 64."""
    behind = -flags.shape[-1] % WORD
    padded = F.pad(flags, (0, behind)).long()
    words = padded.view(*flags.shape[:-1], -1, WORD)
    return (words << torch.arange(WORD, device=flags.device)).sum(-1)


def unpacked(words: Tensor) -> Tensor:
    """The bits of int64 [..., words]: bool [..., words * 64]."""
    place = torch.arange(WORD, device=words.device)
    return ((words[..., None] >> place) & 1).bool().flatten(-2)
