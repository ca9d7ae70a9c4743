"""Rotary position embedding (Su et al. 2021, "RoFormer") and its scalings for longer contexts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from models.rope_parameters import RopeParameters


def inverse_frequencies(rope: RopeParameters, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Radians by which each pair of channels turns from one position to the next.

    The operations and their order are those of transformers' `modeling_rope_utils.py`, so that
    float32 frequencies are equal to the last bit.

    Args:
        rope: the checkpoint's rotary parameters.
        head_dim: even size of one head.
        dtype: float32, or float64 for a model in float64.

    Returns:
        `dtype` [head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2).to(dtype) / head_dim  # [head_dim / 2]
    plain: Tensor = 1.0 / (rope.theta**exponents)  # [head_dim / 2]
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, rope.theta**exponents)
    # Up to its original length, which is all that is served, dynamic scaling changes nothing.
    return plain


def _llama3(rope: RopeParameters, plain: Tensor) -> Tensor:
    """Llama 3.1: slow channels are slowed by `factor`, fast ones kept, a blend in between."""
    wavelength = 2 * math.pi / plain  # [head_dim / 2]  positions a full turn takes
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    scaled = torch.where(wavelength > longest, plain / rope.factor, plain)  # [head_dim / 2]
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, smooth, scaled)


def _yarn(rope: RopeParameters, head_dim: int, periods: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023): interpolation for slow channels, none for fast ones, a ramp between.

    Args:
        rope: the checkpoint's rotary parameters.
        head_dim: even size of one head.
        periods: [head_dim / 2], theta to the power of each pair's exponent.
    """

    def channel(turns: float) -> float:
        """The pair that makes `turns` full turns over the original length."""
        length = rope.original_max_position
        return (head_dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = (torch.arange(head_dim // 2, dtype=periods.dtype) - low) / (high - low)
    kept = 1 - torch.clamp(ramp, 0, 1)  # [head_dim / 2]  1: as trained, 0: interpolated
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


class Rotary:
    """Rotates queries and keys by their positions.

    Angles are computed from positions at each step rather than read from a table, which would
    take half a gigabyte at a million positions.
    """

    def __init__(
        self, rope: RopeParameters, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.frequencies = inverse_frequencies(rope, head_dim, wide).to(device)  # [head_dim / 2]
        self.attention_factor = rope.attention_factor

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a step's positions, the same for all layers.

        Args:
            positions: int64 [tokens].

        Returns:
            Two tensors [tokens, 1, head_dim / 2], float32, or float64 for a model in float64.
        """
        turns = positions[:, None, None] * self.frequencies  # [tokens, 1, head_dim / 2]
        if self.attention_factor == 1.0:  # a step waits for every launch
            return turns.cos(), turns.sin()
        return turns.cos() * self.attention_factor, turns.sin() * self.attention_factor

    @staticmethod
    def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate each head: channel i is paired with channel i + head_dim / 2.

        Args:
            x: [tokens, heads, head_dim], queries or keys.
            angles: what `angles` returned for the tokens' positions.

        Returns:
            [tokens, heads, head_dim] in the dtype of `x`, rounded once.
        """
        cos, sin = angles
        first, second = x.to(cos.dtype).chunk(2, dim=-1)  # [tokens, heads, head_dim / 2] each
        # [tokens, heads, head_dim]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)
