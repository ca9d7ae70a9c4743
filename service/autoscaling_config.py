"""The configuration of `service.autoscaling`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AutoscalingConfig(BaseModel):
    """How many copies of the model there are, by their load; see `service.autoscaling`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1, description="copies that there always are")
    max_replicas: int | None = Field(
        default=None, ge=1, description="most copies; without it `replicas` is a fixed number"
    )
    queued_tokens_per_replica: int = Field(
        default=32_768, ge=1, description="prompt tokens that may wait for their prefill a copy"
    )
    kv_usage: float = Field(
        default=0.8, gt=0, le=1, description="share of its KV cache that a copy may use"
    )
    upscale_delay_s: float = Field(
        default=3, ge=0, description="seconds of too much load until there are more copies"
    )
    downscale_delay_s: float = Field(
        default=300, ge=0, description="seconds of little load until there are fewer"
    )

    @model_validator(mode="after")
    def _range_is_possible(self) -> AutoscalingConfig:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas} and min_replicas {self.min_replicas}; "
                "raise the first or lower the second"
            )
        return self
