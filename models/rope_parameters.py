"""Rotary parameters as a checkpoint's config.json states them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from models.errors import UnsupportedModelError
from models.fields import Fields

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Base and scaling of the rotary embedding; fields of other kinds keep their defaults.

    Attributes:
        kind: scaling.
        theta: base of the frequencies.
        factor: how many times longer the context is than the original one.
        original_max_position: positions before scaling.
        low_freq_factor: llama3, turns over the original length under which a channel is slowed.
        high_freq_factor: llama3, turns over the original length above which a channel is kept.
        beta_fast: yarn, turns over the original length above which a channel is kept.
        beta_slow: yarn, turns over the original length under which a channel is interpolated.
        attention_factor: yarn, multiplies cosines and sines.
        truncate: yarn, round the ramp's ends to whole channels.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    @staticmethod
    def parse(config: Fields, max_position: int) -> RopeParameters:
        """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

        Args:
            config: config.json.
            max_position: its max_position_embeddings.

        Raises:
            CheckpointError: when a field is missing or of a wrong type.
            UnsupportedModelError: for a kind of scaling that would be computed wrongly.
        """
        rope = _section(config)
        name = rope.maybe_text("rope_type") or rope.maybe_text("type") or "default"
        if name not in KINDS:
            raise UnsupportedModelError(
                f"{rope.source}: rope_type {name!r} is not supported; "
                f"use a checkpoint with one of {', '.join(KINDS)}."
            )
        kind = cast("RopeKind", name)
        theta = rope.positive("rope_theta", config.positive("rope_theta", 10_000.0))
        # The field outside the section comes first, as transformers reads it.
        original = config.integer(
            "original_max_position_embeddings",
            rope.integer("original_max_position_embeddings", max_position),
        )
        if kind == "yarn":
            return _yarn(rope, theta, original, max_position)
        if kind == "llama3":
            low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
            if low >= high:
                raise rope.wrong("high_freq_factor", "a number above low_freq_factor")
            return RopeParameters(
                kind=kind,
                theta=theta,
                factor=rope.positive("factor"),
                original_max_position=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        # Linear and dynamic scaling know no original length in transformers.
        factor = 1.0 if kind == "default" else rope.positive("factor")
        return RopeParameters(
            kind=kind, theta=theta, factor=factor, original_max_position=max_position
        )


def _section(config: Fields) -> Fields:
    """The object that describes the scaling, empty when there is none."""
    new, old = config.maybe_object("rope_parameters"), config.maybe_object("rope_scaling")
    if new and old and new.values != old.values:
        raise UnsupportedModelError(
            f"{config.source} has both rope_parameters and rope_scaling and they differ; "
            "keep the one that the checkpoint was trained with."
        )
    section = new or old or Fields({}, config.source)
    if any(isinstance(value, dict) for value in section.values.values()):
        raise UnsupportedModelError(
            f"{section.source} differs by layer type, which is not supported; "
            "use a checkpoint with one set of rotary parameters."
        )
    if section.values.get("mrope_section") is not None:
        raise UnsupportedModelError(
            f"{section.source}: mrope_section (multimodal positions) is not supported; "
            "use a text-only checkpoint."
        )
    for fields in (section, config):
        if fields.positive("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"{fields.source}: partial_rotary_factor must be 1; heads that are rotated only "
                "in part are not supported."
            )
    return section


def _yarn(rope: Fields, theta: float, original: int, max_position: int) -> RopeParameters:
    factor = rope.positive("factor", max_position / original)
    attention_factor = rope.maybe_number("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = rope.maybe_number("mscale"), rope.maybe_number("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        else:
            attention_factor = _mscale(factor, 1.0)
    return RopeParameters(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=rope.flag("truncate", True),
    )


def _mscale(factor: float, weight: float) -> float:
    """Section 3.4 of the YaRN paper, as transformers computes it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
