"""What clients may send: OpenAI's fields, the usual sampling extras, and `sparsity`.

Unknown top-level fields are ignored, since clients send many; unknown fields of `sparsity` are
not, since a misspelt budget would go unnoticed. A null counts as absent. Values are strict: "1" is
not 1. Caps come from the configuration through the validation context, a `Bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kernels.errors import PatternError
from kernels.patterns.pattern import Pattern
from service.api.errors import InvalidPatternError
from service.config import LimitsConfig  # noqa: TC001  pydantic reads the annotations

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What validation must know about the service."""

    limits: LimitsConfig
    vocab_size: int

    def token_ids(self, values: list[Any], *, what: str = "token ids") -> list[int]:
        """`values` when they are all ids of the vocabulary.

        Raises:
            ValueError: some are not.
        """
        if set(map(type, values)) - {int}:
            raise ValueError(f"{what} must be integers")
        if values and (min(values) < 0 or max(values) >= self.vocab_size):
            raise ValueError(f"{what} must lie in 0 to {self.vocab_size - 1}")
        return values


class Body(BaseModel):
    """A request's body, or an object within one."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if value is not None}


class SparsityRequest(Body):
    """`sparsity`: where this request's attention looks; what is absent is the service's default."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["dynamic", "fixed", "dense", "auto"] | None = None
    coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    min_keys: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_keys: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    sampled: bool | None = None
    dense_layers: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_coverage: Annotated[float, Field(ge=0, le=1)] | None = None
    pattern: Annotated[str, Field(max_length=4096)] | None = None  # the parser takes fewer
    prefill: Literal["dynamic", "fixed", "dense"] | None = None
    prefill_coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    allow_brownout: bool | None = None
    explain: bool | Literal["tokens"] | None = None  # what was attended: at the end, or by token
    explain_layers: Annotated[list[int], Field(min_length=1, max_length=1024)] | None = None
    explain_heads: Annotated[list[int], Field(min_length=1, max_length=1024)] | None = None

    @field_validator("explain", mode="before")
    @classmethod
    def _explain_is_one_of_three(cls, explain: Any) -> Any:
        # A union would complain twice, of a field `explain.bool` and of another.
        if not isinstance(explain, bool) and explain != "tokens":
            raise ValueError('must be true, false or "tokens"')
        return explain

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, pattern: str | None) -> str | None:
        try:
            return None if pattern is None else str(Pattern.parse_causal(pattern))
        except PatternError as error:
            raise InvalidPatternError(error) from None


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(Body):
    """What completions and chats share."""

    model: str = Field(min_length=1)
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: int = Field(default=0, ge=0)
    # None where the checkpoint's generation_config.json may propose a value.
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = {}
    priority: int = 0  # lower is earlier
    # vLLM's: prompts of other salts neither find what this one leaves in the prefix cache nor tell,
    # by the time they take, what it was.
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    sparsity: SparsityRequest = SparsityRequest()

    @field_validator("priority")
    @classmethod
    def _priority_is_bounded(cls, priority: int, info: ValidationInfo) -> int:
        if abs(priority) > (most := _bounds(info).limits.priority):
            raise ValueError(f"must lie in {-most} to {most}")
        return priority

    @field_validator("n")
    @classmethod
    def _n_is_capped(cls, n: int, info: ValidationInfo) -> int:
        if n > (cap := _bounds(info).limits.n):
            raise ValueError(f"at most {cap} choices a prompt")
        return n

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_capped(cls, stop: Any, info: ValidationInfo) -> Any:
        limits = _bounds(info).limits
        strings = [stop] if isinstance(stop, str) else stop
        if isinstance(strings, list):
            if len(strings) > limits.stop:
                raise ValueError(f"at most {limits.stop} stop strings")
            if any(isinstance(s, str) and not 0 < len(s) <= limits.stop_chars for s in strings):
                raise ValueError(f"stop strings have 1 to {limits.stop_chars} characters each")
        return strings

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_ids_are_tokens(cls, ids: Any, info: ValidationInfo) -> Any:
        bounds = _bounds(info)
        if isinstance(ids, list):
            if len(ids) > (cap := bounds.limits.stop_token_ids):
                raise ValueError(f"at most {cap} stop token ids")
            bounds.token_ids(ids)
        return ids

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_is_by_token(cls, bias: Any, info: ValidationInfo) -> Any:
        bounds = _bounds(info)
        if not isinstance(bias, dict):
            return bias
        if len(bias) > (cap := bounds.limits.logit_bias):
            raise ValueError(f"at most {cap} entries")
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in bias):
            raise ValueError("keys must be token ids")
        ids = bounds.token_ids([int(key) for key in bias], what="keys")
        values = list(bias.values())
        if set(map(type, values)) - {int, float} or not all(-100 <= v <= 100 for v in values):
            raise ValueError("values must be numbers from -100 to 100")
        return dict(zip(ids, map(float, values), strict=True))

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.sparsity.explain == "tokens" and not self.stream:
            raise ValueError('sparsity.explain: "tokens" needs stream to be true; or write true')
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream to be true")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: list[Prompt]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompt_is_one_or_many(cls, prompt: Any, info: ValidationInfo) -> list[Prompt]:
        return one_or_many(prompt, info)

    @field_validator("logprobs")
    @classmethod
    def _logprobs_are_capped(cls, logprobs: int | None, info: ValidationInfo) -> int | None:
        return _capped_logprobs(logprobs, info)

    @model_validator(mode="after")
    def _fields_agree(self, info: ValidationInfo) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of: must equal n; every choice is returned")
        if len(self.prompt) * self.n > (cap := _bounds(info).limits.choices):
            raise ValueError(f"n: at most {cap} choices over all prompts of a request")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: must be at least 1 without echo")
        return self


class Message(Body):
    """One message of a chat; text parts become one text, a line each, as in vLLM."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _no_tool_was_called(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("tool_calls") or values.get("function_call")):
            raise ValueError("calls of tools are not supported; send what they said as content")
        return values

    @field_validator("content", mode="before")
    @classmethod
    def _content_is_text(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError('only parts of type "text" are supported')
            if not isinstance(part.get("text"), str):
                raise ValueError('a part of type "text" needs a text')
        return "\n".join(part["text"] for part in content)


def _capped_messages(messages: Any, info: ValidationInfo) -> Any:
    cap = _bounds(info).limits.messages
    if isinstance(messages, list) and len(messages) > cap:
        raise ValueError(f"at most {cap} messages a chat")
    return messages


Messages = Annotated[list[Message], BeforeValidator(_capped_messages)]


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool = True

    @field_validator("top_logprobs")
    @classmethod
    def _logprobs_are_capped(cls, logprobs: int | None, info: ValidationInfo) -> int | None:
        return _capped_logprobs(logprobs, info)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if not self.add_generation_prompt:
            raise ValueError("add_generation_prompt: must be true: a chat is answered")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: must be at least 1")
        return self


class TokenizeRequest(Body):
    """Body of POST /tokenize: a prompt or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Messages, Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    return_offsets: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]

    @field_validator("tokens", mode="plain")
    @classmethod
    def _ids_are_tokens(cls, tokens: Any, info: ValidationInfo) -> list[int]:
        if not isinstance(tokens, list):
            raise ValueError("must be a list of token ids")
        return _bounds(info).token_ids(tokens)


def one_or_many(prompt: Any, info: ValidationInfo) -> list[Prompt]:
    """Texts or token ids, one or several.

    Raises:
        ValueError: they are something else, or too many.
    """
    # By hand: a union would try every element of a million ids against each form.
    bounds = _bounds(info)
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )
    if type(prompt[0]) is int:
        return [bounds.token_ids(prompt)]
    if len(prompt) > (cap := bounds.limits.prompts):
        raise ValueError(f"at most {cap} prompts a request")
    if all(isinstance(one, str) for one in prompt):
        return prompt
    if all(isinstance(one, list) for one in prompt):
        return [bounds.token_ids(one) for one in prompt]
    raise ValueError("must not mix strings, token ids and lists")


def _bounds(info: ValidationInfo) -> Bounds:
    assert isinstance(info.context, Bounds)
    return info.context


def _capped_logprobs(logprobs: int | None, info: ValidationInfo) -> int | None:
    if logprobs is not None and logprobs > (cap := _bounds(info).limits.logprobs):
        raise ValueError(f"at most {cap}")
    return logprobs
