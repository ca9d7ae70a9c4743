"""What transformers adds to a text's tokens where the caller says nothing.

Longformer's classifier makes the first token global, and its model for questions the question's
tokens; its other heads have no global tokens. BigBird's model for questions makes all behind the
question of type 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.encoders.texts import Text
from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.encoders.config import EncoderConfig


def text_of(
    config: EncoderConfig,
    ids: Sequence[int],
    *,
    types: Sequence[int] | None = None,
    global_tokens: Sequence[int] | None = None,
) -> Text:
    """A text as the head of a configuration takes it.

    Args:
        config: the encoder's.
        ids: the tokens with the special ones.
        types: 0 or 1 for each; None for the default.
        global_tokens: places of Longformer's global tokens; None for the default.

    Raises:
        ModelError: it is empty, too long, or one of the arguments does not fit.
    """
    if len(ids) > config.max_model_len:
        raise ModelError(
            f"A text has {len(ids)} tokens with the special ones, and the model takes "
            f"{config.max_model_len}; shorten it."
        )
    if ids and not (min(ids) >= 0 and max(ids) < config.vocab_size):
        raise ModelError(f"Token ids must lie in 0 to {config.vocab_size - 1}.")
    if types is None:
        types = default_types(config, ids)
    elif types and not (min(types) >= 0 and max(types) < config.type_vocab_size):
        raise ModelError(f"Token types must lie in 0 to {config.type_vocab_size - 1}.")
    if config.family != "longformer":
        if global_tokens:
            raise ModelError("BigBird's global tokens are its first and last block; name none.")
        global_tokens = ()
    elif global_tokens is None:
        global_tokens = default_global_tokens(config, ids)
    return Text.of(ids, types=types, global_tokens=global_tokens)


def default_types(config: EncoderConfig, ids: Sequence[int]) -> list[int] | None:
    """Types of a text's tokens; None for 0."""
    if config.family == "bigbird" and config.head == "question_answering":
        question = question_length(config, ids)
        return [0] * min(question, len(ids)) + [1] * (len(ids) - question)
    return None


def default_global_tokens(config: EncoderConfig, ids: Sequence[int]) -> Sequence[int]:
    """Places of Longformer's global tokens.

    Raises:
        ModelError: a text to be asked has no question.
    """
    if config.head == "classification":
        return (0,)
    if config.head != "question_answering":
        return ()
    if config.sep_id not in ids:
        raise ModelError(
            "A question must stand before the first separator: join question and context as "
            "<s> question </s></s> context </s>, or name the global tokens."
        )
    return range(ids.index(config.sep_id))


def question_length(config: EncoderConfig, ids: Sequence[int]) -> int:
    """Tokens up to the first separator, which is counted; 1 where there is none."""
    return ids.index(config.sep_id) + 1 if config.sep_id in ids else 1
