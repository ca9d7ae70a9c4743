"""Where attention looks unless a request says otherwise."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kernels.budget import SAMPLE
from kernels.errors import PatternError
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic
from service.engine.types import PolicyName, SparsityParams

CPU_DENSE_BELOW = 2048
"""Tokens from which on dynamic attention is the faster, about: `saccade bench decode` tells."""
GPU_DENSE_BELOW = 16_384
"""The same on a GPU, by `tests/bench/engine.py`: for one sequence; fewer where several run
together."""
CPU_PREFILL_DENSE_BELOW = 16_384
TILES_PREFILL_DENSE_BELOW = 2048
GPU_PREFILL_DENSE_BELOW = 8192
"""Position in a prompt from which on reading some pages is the faster: `saccade bench prefill`. On
a CPU some heads of the bundled model, which read nearly all, put it off, but for one that has tile
registers (`kernels.cpu.amx`)."""


class SparsityConfig(BaseModel):
    """Where attention looks unless a request says otherwise; the fields of `sparsity` requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    policy: Literal["dynamic", "fixed", "dense", "auto"] = Field(
        default="dynamic",
        description="dynamic: each step chooses its keys; fixed: a pattern does; dense: all are "
        "read; auto: dynamic as yet",
    )
    coverage: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="attention mass that the keys read should carry, as estimated, 0 to 1",
    )
    min_keys: int = Field(
        default=384,
        ge=0,
        description="a key with about 1 / min_keys of the attention mass is read for certain; "
        "where few carry the mass fewer are read",
    )
    max_keys: int = Field(
        default=1024,
        ge=1,
        description="about the most keys a query and KV head; where attention is spread at "
        f"least {SAMPLE} are drawn",
    )
    sampled: bool = Field(
        default=True, description="keys are drawn and stand for the others; false: plain top-k"
    )
    dense_layers: int = Field(default=0, ge=0, description="so many first layers attend densely")
    min_coverage: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="estimate under which a request falls back to dense; 0: never",
    )
    pattern: str = Field(
        default="sinks:16+window:1024", max_length=256, description="keys of the fixed policy"
    )
    prefill: Literal["dynamic", "fixed", "dense"] | None = Field(
        default=None,
        description="how a prompt attends up to its last 128 tokens; by default as `policy` says",
    )
    prefill_coverage: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="where a prompt attends dynamically, 1 less what of a query's attention mass "
        "may be lost to the means of pages that are not read; by default `coverage`",
    )
    prefill_dense_below: int | None = Field(
        default=None,
        ge=0,
        description="position in a prompt, in tokens, below which it attends densely; by default "
        f"{GPU_PREFILL_DENSE_BELOW} on a GPU, {CPU_PREFILL_DENSE_BELOW} on a CPU, or "
        f"{TILES_PREFILL_DENSE_BELOW} on one with AMX in bfloat16",
    )
    allow_brownout: bool = Field(
        default=True,
        description="under overload the budget may be cut, where the service's `brownout` is on",
    )
    dense_below: int | None = Field(
        default=None,
        ge=0,
        description="context, in tokens, below which dense attention runs; by default "
        f"{GPU_DENSE_BELOW} on a GPU, {CPU_DENSE_BELOW} on a CPU",
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, pattern: str) -> str:
        try:
            return str(Pattern.parse_causal(pattern))
        except PatternError as error:
            # In one line: what a log shows of a configuration has no room for a mark below it.
            raise ValueError(str(error).partition("\n")[0]) from None

    def dense_below_on(self, device: str) -> int:
        """Context below which dense attention runs, tokens; a device is "cpu", "cuda", "cuda:1"."""
        if self.dense_below is not None:
            return self.dense_below
        return GPU_DENSE_BELOW if device.startswith("cuda") else CPU_DENSE_BELOW

    def prefill_dense_below_on(self, device: str, *, tiles: bool) -> int:
        """Position in a prompt below which it attends densely, tokens.

        Args:
            device: as above.
            tiles: whether its pages are read in a CPU's tile registers.
        """
        if self.prefill_dense_below is not None:
            return self.prefill_dense_below
        if device.startswith("cuda"):
            return GPU_PREFILL_DENSE_BELOW
        return TILES_PREFILL_DENSE_BELOW if tiles else CPU_PREFILL_DENSE_BELOW

    def resolve(self) -> SparsityParams:
        """These defaults as the engine takes them.

        Where one end of the budget is given alone, the other moves along.

        Raises:
            KernelError: the budget contradicts itself.
        """
        least, most, given = self.min_keys, self.max_keys, self.model_fields_set
        if "min_keys" not in given:
            least = min(least, most)
        elif "max_keys" not in given:
            most = max(least, most)
        Dynamic(coverage=self.coverage, min_keys=least, max_keys=most)
        policy: PolicyName = "dynamic" if self.policy == "auto" else self.policy
        return SparsityParams(
            policy=policy,
            coverage=self.coverage,
            min_keys=least,
            max_keys=most,
            sampled=self.sampled,
            dense_layers=self.dense_layers,
            min_coverage=self.min_coverage,
            pattern=self.pattern,
            allow_brownout=self.allow_brownout,
            prefill=self.prefill or policy,
            prefill_coverage=self.prefill_coverage or self.coverage,
        )
