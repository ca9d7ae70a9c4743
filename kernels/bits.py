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


def first_bits(count: Tensor) -> Tensor:
    """int64, words whose first bits, so many of 64, are set."""
    return (-1 << count.clamp_max(WORD - 1)).bitwise_not().masked_fill(count == WORD, -1)


def ones(words: Tensor) -> Tensor:
    """How many bits of int64 [..., words] are set, int64 [...].

    By sums of neighbours: of pairs of bits, of fours, of bytes (Warren, "Hacker's Delight", 5-1).
    """
    pairs = words - (words >> 1 & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333)
    eights = fours + (fours >> 4) & 0x0F0F0F0F0F0F0F0F
    return (eights * 0x0101010101010101 >> 56).sum(-1)
