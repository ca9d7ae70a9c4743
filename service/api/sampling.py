"""From a checked request to what the engine takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernels.errors import KernelError
from kernels.patterns.pattern import Pattern
from service.engine.types import Explain, SamplingParams, SparsityParams
from service.errors import RequestError

if TYPE_CHECKING:
    from models.generation import GenerationDefaults
    from service.api.schemas import GenerationRequest, SparsityRequest
    from service.sparsity import SparsityConfig


def token_budget(
    request: GenerationRequest,
    prompt_tokens: int,
    max_model_len: int,
    default: int | None,
    param: str,
) -> int:
    """Most new tokens a choice.

    Args:
        request: its `max_completion_tokens` goes before its `max_tokens`.
        prompt_tokens: length of the longest prompt.
        max_model_len: most tokens of a prompt and its answer.
        default: where the request says nothing; None for all that remain.
        param: the field that holds the prompt.

    Raises:
        RequestError: prompt and answer do not fit the model; names the field to change.
    """
    asked = request.max_tokens
    field = "max_tokens"
    if request.max_completion_tokens is not None:
        asked, field = request.max_completion_tokens, "max_completion_tokens"
    room = max_model_len - prompt_tokens
    if room < (1 if asked is None else min(asked, 1)):
        raise RequestError(
            f"{param}: {prompt_tokens} tokens leave no room for an answer within the model's limit "
            f"of {max_model_len} tokens; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if asked is None:
        budget = room if default is None else min(default, room)
    elif asked > room:
        raise RequestError(
            f"{field}: {asked} and the prompt's {prompt_tokens} tokens are more than the model's "
            f"limit of {max_model_len}; ask for at most {room}, or shorten the prompt",
            param=field,
            code="context_length_exceeded",
        )
    else:
        budget = asked
    if request.min_tokens > budget:
        raise RequestError(
            f"min_tokens: {request.min_tokens} is more than the {budget} tokens that the answer "
            "may have; lower it, or raise max_tokens",
            param="min_tokens",
        )
    return budget


def sampling_params(
    request: GenerationRequest,
    defaults: GenerationDefaults,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How the tokens are chosen; what the request leaves open the checkpoint may propose."""

    def pick(name: str, neutral: float) -> float:
        for value in (getattr(request, name), getattr(defaults, name)):
            if value is not None:
                return float(value)
        return neutral

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=pick("temperature", 1.0),
        top_p=pick("top_p", 1.0),
        top_k=max(0, int(pick("top_k", 0))),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=request.seed,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=tuple(request.logit_bias.items()),
        skip_special_tokens=request.skip_special_tokens,
    )


def sparsity_params(request: SparsityRequest, defaults: SparsityConfig) -> SparsityParams:
    """Where the attention looks: the request's fields over the service's.

    A request that names one end of the budget moves the service's other end along with it.

    A pattern of its own may be any causal one under the policies `fixed` and `dense`: it is what
    was asked for, or of no effect behind the prompt. Under `dynamic` it is also what a failed
    selection falls back to, so that every query must see the key before it.

    Raises:
        RequestError: the request's own fields contradict each other, or the pattern is no fallback.
    """
    unlike = {"explain", "explain_layers", "explain_heads"}
    given = request.model_dump(exclude_none=True, exclude=unlike)
    if "max_keys" in given:
        given.setdefault("min_keys", min(defaults.min_keys, given["max_keys"]))
    elif "min_keys" in given:
        given["max_keys"] = max(defaults.max_keys, given["min_keys"])
    try:
        resolved = defaults.model_copy(update=given).resolve()
    except KernelError as error:
        message = f"sparsity.{error}"
        raise RequestError(message, param=message.split(" ", 1)[0]) from error
    pattern = Pattern.parse(resolved.pattern)
    if resolved.policy == "dynamic" and not pattern.keeps_previous:
        raise RequestError(
            f"sparsity.pattern: {pattern} is what a failed selection would fall back to, and "
            "models lose their thread where a token cannot see the one before it: write "
            f"{pattern.expression}+window:2, or the policy fixed to see what becomes of it",
            param="sparsity.pattern",
            code="invalid_pattern",
        )
    return replace(resolved, explain=_explain(request))


def _explain(request: SparsityRequest) -> Explain | None:
    if not request.explain:
        return None
    layers, heads = request.explain_layers, request.explain_heads
    return Explain(
        tokens=request.explain == "tokens",
        layers=None if layers is None else tuple(sorted(set(layers))),
        heads=None if heads is None else tuple(sorted(set(heads))),
    )
