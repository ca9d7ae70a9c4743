"""The configuration of `service.engine.brownout`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.engine.brownout import Brownout, Targets
from service.engine.cuts import Levels, halvings_of


class BrownoutConfig(BaseModel):
    """Whether answers may read fewer keys than asked for under overload.

    Those of requests with `allow_brownout` and the dynamic policy only; see
    [Brownout](operations.md#brownout).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(default=False, description="budgets are cut under overload")
    max_wait_s: float = Field(
        default=2.0, gt=0, description="seconds that a request may wait in the queue"
    )
    itl_target_ms: float = Field(
        default=100.0, gt=0, description="milliseconds between two tokens, mean over a second's"
    )
    calm_s: float = Field(
        default=10.0,
        ge=1,
        description="seconds without pressure after which budgets are cut less, level by level",
    )
    halvings: int | None = Field(
        default=None,
        ge=0,
        le=16,
        description="levels that halve budgets, each once more, down to 512 keys; by default as "
        "many as `sparsity.max_keys` takes to get there",
    )
    # Off: at most lengths a pattern reads more keys than the smallest budget, it is blind to all
    # others, and no CUDA graph has it. It pays where a context's codes are what costs.
    fixed: bool = Field(
        default=False,
        description="one more level puts the fixed pattern in their place, which sees nothing else",
    )

    @model_validator(mode="after")
    def _there_is_something_to_cut(self) -> BrownoutConfig:
        if self.enabled and self.halvings == 0 and not self.fixed:
            raise ValueError(
                "halvings is 0 and fixed false, so that nothing is ever cut; change one of them, "
                "or set enabled to false"
            )
        return self

    def levels(self, max_keys: int) -> Levels:
        """What is cut, where requests that name no number have `max_keys`."""
        if not self.enabled:
            return Levels()
        return Levels(halvings_of(max_keys) if self.halvings is None else self.halvings, self.fixed)

    def controller(self, max_keys: int) -> Brownout:
        """What decides for one engine."""
        targets = Targets(self.max_wait_s, self.itl_target_ms / 1000, self.calm_s)
        return Brownout(targets, self.levels(max_keys))
