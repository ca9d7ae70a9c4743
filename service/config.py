"""The service's configuration: flags over SACCADE_* variables over a file over these defaults."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from kernels.errors import KernelError
from kernels.patterns.pattern import Pattern
from service.autoscaling_config import AutoscalingConfig
from service.brownout_config import BrownoutConfig
from service.errors import ConfigError
from service.sparsity import SparsityConfig
from service.wording import sentence

ENV_PREFIX = "SACCADE_"
BUNDLED_CHECKPOINT = (
    Path(__file__).resolve().parent.parent / "models" / "checkpoints" / "saccade-12m"
)


class LimitsConfig(BaseModel):
    """Caps on what one request may ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int = Field(default=8, ge=1, description="choices a prompt")
    prompts: int = Field(default=128, ge=1, description="prompts a request")
    choices: int = Field(default=256, ge=1, description="prompts x n")
    stop: int = Field(default=16, ge=0, description="stop strings")
    stop_chars: int = Field(default=256, ge=1, description="characters a stop string")
    stop_token_ids: int = Field(default=128, ge=0, description="stop token ids")
    logprobs: int = Field(default=20, ge=0, description="rivals reported a token")
    echo_logprobs: int = Field(
        default=1_000_000, ge=0, description="prompt tokens x (rivals + 1) x n of an echo"
    )
    logit_bias: int = Field(default=1024, ge=0, description="entries of logit_bias")
    priority: int = Field(
        default=100,
        ge=0,
        description="how far a request's priority may be from 0, either way; 0: all wait alike",
    )
    messages: int = Field(default=4096, ge=1, description="messages of a chat")


class EncoderServing(BaseModel):
    """How Longformer and BigBird are served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="a text's embedding: mean of its tokens', or the first one's"
    )
    normalize: bool = Field(default=True, description="embeddings have length 1, as OpenAI's have")
    random_attention: Literal["published", "transformers_eval"] = Field(
        default="published",
        description="BigBird's random blocks: as trained, or block 0, as transformers' eval() has",
    )


class ServiceConfig(BaseSettings):
    """Everything that `saccade serve` and the Ray Serve application can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    model: Path = Field(
        default=BUNDLED_CHECKPOINT, description="checkpoint folder, Hugging Face format"
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="name in requests and answers; the folder's by default",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    proxy: Literal["auto", "haproxy", "ray"] = Field(
        default="auto",
        description="in front of replicas (Ray Serve): haproxy; ray, Serve's own, which is slower "
        "and tells open streams that their replica died; auto: haproxy where it runs",
    )
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of weights and computing: float64, float32, bfloat16, float16; auto: the "
        "checkpoint's",
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1")
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors", description="dummy: random weights from config.json alone"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="most tokens of prompt and answer; the checkpoint's by default",
    )
    kv_cache_gib: float = Field(default=2.0, gt=0, description="memory for keys and values, GiB")
    max_num_seqs: int = Field(default=16, ge=1, description="sequences that run at once")
    max_queue: int = Field(
        default=256, ge=0, description="requests that may wait; more are told 503"
    )
    prefill_chunk: int = Field(
        default=1024,
        ge=1,
        description="prompt tokens of one sequence a step; a core, where a CPU's share a step",
    )
    max_step_tokens: int = Field(
        default=2048, ge=1, description="tokens of all sequences a step; a core, too"
    )
    prefix_cache: bool = Field(
        default=True,
        description="keep what was computed of a prompt, while there is room, for requests that "
        "begin alike",
    )
    cuda_graphs: bool = Field(
        default=True, description="on a GPU, capture decode steps at the start and replay them"
    )
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="clients send it as `Authorization: Bearer KEY`; none: no check",
    )
    metrics_need_key: bool = Field(default=False, description="/metrics also asks for the API key")
    max_body_mib: float = Field(default=32.0, gt=0, description="largest request body, MiB")
    replicas: int = Field(default=1, ge=1, description="copies of the model (Ray Serve)")
    affinity_limit: int | None = Field(
        default=None,
        ge=1,
        description="requests at a copy from which on its sessions go to others (Ray Serve); "
        "max_num_seqs by default",
    )
    drain_s: int = Field(
        default=30,
        ge=10,
        description="seconds that running requests have to end when a copy of the model stops; "
        "then they end with an error",
    )
    update_surge_percent: int = Field(
        default=0,
        ge=0,
        le=100,
        description="more copies while an update replaces them (Ray Serve), which need room; 0: "
        "old ones stop first",
    )
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    sparsity: SparsityConfig = SparsityConfig()
    brownout: BrownoutConfig = BrownoutConfig()
    limits: LimitsConfig = LimitsConfig()
    encoder: EncoderServing = EncoderServing()

    @model_validator(mode="before")
    @classmethod
    def _variables_are_known(cls, values: Any) -> Any:
        for name in sorted(os.environ):
            path = name.upper().removeprefix(ENV_PREFIX).lower().split("__")
            if name.upper().startswith(ENV_PREFIX) and not _is_field(cls, path):
                known = ", ".join(ENV_PREFIX + field.upper() for field in cls.model_fields)
                raise ValueError(
                    f"the environment variable {name} is unknown; unset it or use one of {known} "
                    f"(for a field of a group: {ENV_PREFIX}SPARSITY__COVERAGE)"
                )
        return values

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(
                f"must be auto, cpu, cuda, or a GPU by number such as cuda:1, not {device!r}"
            )
        return device

    @field_validator("sparsity")
    @classmethod
    def _budget_is_possible(cls, sparsity: SparsityConfig) -> SparsityConfig:
        try:
            sparsity.resolve()
        except KernelError as error:
            raise ValueError(str(error)) from None
        if not Pattern.parse(sparsity.pattern).keeps_previous:
            raise ValueError(
                f"the pattern {sparsity.pattern} is also what a failed selection falls back to, "
                "and models lose their thread where a token cannot see the one before it; add "
                "window:64"
            )
        return sparsity

    @model_validator(mode="after")
    def _replicas_are_said_once(self) -> ServiceConfig:
        if self.replicas > 1 and self.autoscaling.max_replicas is not None:
            raise ValueError(
                f"replicas is the fixed number {self.replicas} and autoscaling.max_replicas asks "
                "for a changing one; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_cut(self) -> ServiceConfig:
        most = self.sparsity.resolve().max_keys
        if self.brownout.enabled and self.brownout.levels(most).last == 0:
            raise ValueError(
                f"brownout.enabled is true and sparsity.max_keys {most} is small already, so that "
                "nothing would be cut; say how often requests' own budgets are halved with "
                "brownout.halvings, or set brownout.fixed, or brownout.enabled to false"
            )
        return self

    @property
    def most_replicas(self) -> int:
        """Copies of the model that there may be at a time, an update's too."""
        most = self.autoscaling.max_replicas or self.replicas
        # As Serve rounds.
        return most + -(-most * self.update_surge_percent // 100)

    def check_ray_device(self) -> None:
        """Refuse one of several GPUs by number under Ray.

        Raises:
            ConfigError: `device` names one; Ray gives each replica a GPU of its own.
        """
        if ":" in self.device:
            raise ConfigError(
                f"invalid configuration: device {self.device}: Ray gives each replica a GPU of its "
                "own; write cuda, or serve with --standalone"
            )

    @property
    def model_name(self) -> str:
        """The model's name in requests and answers."""
        return self.served_model_name or self.model.resolve().name


def load_config(flags: dict[str, Any] | None = None, file: Path | None = None) -> ServiceConfig:
    """Merge the sources of configuration.

    Args:
        flags: by field name, nested groups as dictionaries; only what was given.
        file: YAML or JSON with the fields of `ServiceConfig`.

    Raises:
        ConfigError: one sentence with the key, what is wrong, and where.
    """
    values = _read(file) if file is not None else {}
    try:
        values = _merge(values, EnvSettingsSource(ServiceConfig)())
        return ServiceConfig(**_merge(values, flags or {}))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    except SettingsError as error:
        raise ConfigError(
            f"invalid configuration: {error}; write groups as JSON or one by one, such as "
            f"{ENV_PREFIX}SPARSITY__COVERAGE=0.95"
        ) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {file}: {reason}") from None
    try:
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else getattr(error, "lineno", "?")
        raise ConfigError(
            f"the configuration file {file} is not valid YAML or JSON (line {line})"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"the configuration file {file} must hold `key: value` lines")
    return values


def _is_field(model: type[BaseModel], path: list[str]) -> bool:
    """Whether `path` leads to a field of `model`, through groups only."""
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    kind = field.annotation
    group = inspect.isclass(kind) and issubclass(kind, BaseModel)
    return group and _is_field(kind, path[1:])  # type: ignore[arg-type]


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`, group by group."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        both_groups = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both_groups else value  # type: ignore[arg-type]
    return merged


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = sentence(first)
    if not key:
        return f"invalid configuration: {message}"
    if first["type"] == "extra_forbidden":
        return f"invalid configuration: {key} is unknown; remove it or correct its spelling"
    given = repr(first["input"])
    said_already = first["type"] == "value_error" or "api_key" in key or len(given) > 60
    shown = "" if said_already else f", not {given}"
    return f"invalid configuration: {key}: {message}{shown}"
