"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from service.engine.types import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def completion_logprobs(
    tokens: Sequence[TokenLogprob], offset: int, hidden: AbstractSet[int] = frozenset()
) -> tuple[dict[str, Any], int]:
    """The lists of /v1/completions.

    The sampled token is among its `top_logprobs` even where it is not one of the best.

    Args:
        tokens: in the order of the text.
        offset: characters of the answer's text before the first of them.
        hidden: ids of tokens that the text leaves out.

    Returns:
        The object, and the offset behind the last token.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += 0 if token.token_id in hidden else len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }, offset


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The object of /v1/chat/completions."""
    return {
        "content": [
            {
                **_entry(token.token, token.logprob),
                "top_logprobs": [_entry(text, logprob) for _, text, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _top(token: TokenLogprob) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    # Best first: where two tokens read alike, the better one's value stays.
    top: dict[str, float] = {}
    for _, text, logprob in token.top:
        top.setdefault(text, max(logprob, LOWEST))
    top.setdefault(token.token, max(token.logprob, LOWEST))
    return top


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
