"""What a request must be before the engine takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.errors import SaccadeError
from kernels.patterns.pattern import Pattern
from service.engine.batch import dynamic_policy
from service.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from service.engine.types import Explain, SamplingParams, SparsityParams


def check_request(
    prompt: Seq[int],
    sampling: SamplingParams,
    sparsity: SparsityParams,
    *,
    vocab: int,
    max_model_len: int,
) -> None:
    """Whether a request fits the model.

    Raises:
        RequestError: the prompt or a parameter does not, by name.
    """
    if not prompt:
        raise RequestError("prompt must hold at least one token", param="prompt")
    if not all(0 <= token < vocab for token in prompt):
        raise RequestError(f"prompt token ids must lie in 0 to {vocab - 1}", param="prompt")
    if len(prompt) + sampling.max_tokens > max_model_len:
        # The field at fault is the prompt only when not even one token would fit behind it.
        param = "prompt" if len(prompt) >= max_model_len else "max_tokens"
        raise RequestError(
            f"{len(prompt)} prompt tokens and max_tokens {sampling.max_tokens} exceed the "
            f"model's limit of {max_model_len} tokens: shorten the prompt or max_tokens",
            param=param,
            code="context_length_exceeded",
        )
    for name, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
    ):
        if not all(0 <= token < vocab for token in ids):
            raise RequestError(f"{name} must lie in 0 to {vocab - 1}", param=name)
    try:
        Pattern.parse_causal(sparsity.pattern)
    except SaccadeError as error:
        raise RequestError(str(error), param="sparsity.pattern") from error
    try:
        dynamic_policy(sparsity)
    except SaccadeError as error:
        field_name = str(error).split(" ", 1)[0]
        raise RequestError(str(error), param=f"sparsity.{field_name}") from error


def check_explain(explain: Explain | None, layers: int, heads: int) -> None:
    """Whether the model has the layers and heads that a request asks about.

    Raises:
        RequestError: it has not.
    """
    if explain is None:
        return
    for name, asked, there in (
        ("layers", explain.layers, layers),
        ("heads", explain.heads, heads),
    ):
        if asked is not None and (not asked or not all(0 <= one < there for one in asked)):
            raise RequestError(
                f"sparsity.explain_{name}: must hold numbers from 0 to {there - 1}",
                param=f"sparsity.explain_{name}",
            )
