"""What an encoder's routes share: texts from what was sent, and their answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from models.encoders.defaults import text_of
from models.errors import ModelError
from service.errors import NotOfferedError, RequestError, ServiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.encoders.config import Head
    from models.encoders.texts import Text
    from service.api.schemas import Prompt
    from service.encoders.engine import EncoderEngine, Read

ROUTES: dict[Head, str] = {
    "masked_lm": "/fill-mask",
    "classification": "/classify",
    "question_answering": "/question-answering",
}
"""The route of each head; /v1/embeddings has every encoder."""


def need_head(engine: EncoderEngine, head: Head) -> None:
    """Refuse a route for which the checkpoint has no head.

    Raises:
        NotOfferedError: naming what it has.
    """
    if engine.config.head != head:
        raise NotOfferedError(
            f"{ROUTES[head]} is not offered: {engine.model_name} is a "
            f"{engine.config.architecture}; use {offered(engine)}"
        )


def offered(engine: EncoderEngine) -> str:
    """The routes of a checkpoint, for a message."""
    own = ROUTES.get(engine.config.head)
    return "/v1/embeddings" if own is None else f"{own} or /v1/embeddings"


async def texts_of(
    engine: EncoderEngine,
    prompts: Sequence[Prompt],
    *,
    param: str,
    global_tokens: Sequence[int] | None = None,
) -> list[Text]:
    """Texts as the encoder reads them. Token ids are taken as they are, special ones included.

    Raises:
        RequestError: one is too long, or something does not fit; `param` is the field.
    """

    def make() -> list[Text]:
        return [
            checked_text(
                engine,
                engine.tokenizer.encode(one) if isinstance(one, str) else one,
                param=param,
                global_tokens=global_tokens,
            )
            for one in prompts
        ]

    return await asyncio.to_thread(make)


def checked_text(
    engine: EncoderEngine, ids: Sequence[int], *, param: str, **given: Sequence[int] | None
) -> Text:
    """One text of tokens.

    Raises:
        RequestError: it is too long, or something does not fit.
    """
    if len(ids) > engine.max_model_len:
        raise RequestError(
            f"{param}: a text has {len(ids)} tokens with the special ones, and at most "
            f"{engine.max_model_len} are taken; shorten it or send it in parts",
            param=param,
            code="context_length_exceeded",
        )
    try:
        return text_of(engine.config, ids, **given)
    except ModelError as error:
        raise RequestError(f"{param}: {error}", param=param) from None


async def answers(engine: EncoderEngine, texts: Sequence[Text], reads: Sequence[Read]) -> list[Any]:
    """Run texts, and wait for all. Where one fails, those that wait are given up.

    Raises:
        ServiceError: the first one's error; see `EncoderEngine.submit` for those of the queue.
        RequestError: the model cannot take one of them.
    """
    futures = engine.submit(texts, reads)
    try:
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    except ServiceError:
        raise
    except ModelError as error:
        raise RequestError(str(error)) from None
    finally:
        for future in futures:
            future.cancel()


def usage(texts: Sequence[Text]) -> dict[str, int]:
    """OpenAI's `usage`."""
    tokens = sum(len(text.ids) for text in texts)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
