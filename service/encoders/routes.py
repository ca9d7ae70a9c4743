"""POST /v1/embeddings, /classify, /fill-mask and /question-answering."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi.responses import JSONResponse

from service.api import body
from service.api.state import state_of
from service.encoders.answers import answers, checked_text, need_head, texts_of, usage
from service.encoders.reads import Answer, Embed, Fill, classify
from service.encoders.schemas import (
    ClassifyRequest,
    EmbeddingRequest,
    FillRequest,
    QuestionRequest,
)
from service.errors import RequestError

if TYPE_CHECKING:
    from fastapi import Request
    from torch import Tensor

    from models.encoders.texts import Text
    from models.tokenizer import Pair, Tokenizer
    from service.encoders.engine import EncoderEngine
    from service.encoders.reads import Filled, Span


async def embeddings(request: Request) -> JSONResponse:
    """A vector for each text, in OpenAI's shape."""
    state = state_of(request)
    engine, serving = state.encoder, state.config.encoder
    asked = await body.read(request, EmbeddingRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    size = engine.config.hidden_size
    if asked.dimensions not in (None, size):
        raise RequestError(
            f"dimensions: embeddings have {size} numbers; leave it out", param="dimensions"
        )
    chosen = asked.global_tokens
    if chosen is None and engine.config.family == "longformer":
        chosen = [0]  # so that the first token has seen all
    texts = await texts_of(engine, asked.input, param="input", global_tokens=chosen)
    read = Embed(serving.pooling, serving.normalize)
    vectors = await answers(engine, texts, [read] * len(texts))
    plain = asked.encoding_format == "float"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": vector.tolist() if plain else _base64(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    return JSONResponse(
        {"object": "list", "data": data, "model": engine.model_name, "usage": usage(texts)}
    )


async def classified(request: Request) -> JSONResponse:
    """The label of each text, in vLLM's shape."""
    state = state_of(request)
    engine = state.encoder
    need_head(engine, "classification")
    asked = await body.read(request, ClassifyRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    texts = await texts_of(engine, asked.input, param="input", global_tokens=asked.global_tokens)
    data = []
    for index, scores in enumerate(await answers(engine, texts, [classify] * len(texts))):
        best = max(range(len(scores)), key=scores.__getitem__)
        label = engine.config.labels[best]
        data.append({"index": index, "label": label, "probs": scores, "num_classes": len(scores)})
    return JSONResponse(
        {
            "id": f"classify-{uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": engine.model_name,
            "data": data,
            "usage": usage(texts),
        }
    )


async def fill_mask(request: Request) -> JSONResponse:
    """Tokens for the masked places of each text, in the shape of Hugging Face's pipeline."""
    state = state_of(request)
    engine = state.encoder
    need_head(engine, "masked_lm")
    asked = await body.read(request, FillRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    mask = engine.tokenizer.mask_id
    if mask is None:
        raise RequestError("the checkpoint's tokenizer names no mask_token, so nothing is masked")
    texts = await texts_of(engine, asked.inputs, param="inputs", global_tokens=asked.global_tokens)
    shown = engine.tokenizer.decode([mask], skip_special_tokens=False)
    given = asked.parameters
    targets = None if given.targets is None else _tokens(engine.tokenizer, given.targets)
    waiting = []
    for text in texts:
        places = tuple(place for place, token in enumerate(text.ids) if token == mask)
        if not places:
            raise RequestError(f"inputs: write {shown} where a token is missing", param="inputs")
        waiting.append(Fill(places, given.top_k, targets))
    found = await answers(engine, texts, waiting)
    shapes = [
        _filled(engine.tokenizer, text, fill.places, rows)
        for text, fill, rows in zip(texts, waiting, found, strict=True)
    ]
    return JSONResponse(shapes if asked.several else shapes[0])


async def question_answering(request: Request) -> JSONResponse:
    """Spans of a context that answer a question, in the shape of Hugging Face's pipeline."""
    state = state_of(request)
    engine = state.encoder
    need_head(engine, "question_answering")
    asked = await body.read(request, QuestionRequest, state.bounds, state.max_bytes)
    state.check_model(asked.model)
    context = asked.inputs.context
    pair, text = await asyncio.to_thread(_pair, engine, asked.inputs.question, context)
    given = asked.parameters
    inside = [span is not None for span in pair.spans]
    read = Answer(inside, given.top_k, given.max_answer_len, given.handle_impossible_answer)
    (spans,) = await answers(engine, [text], [read])
    found = [_spanned(span, pair, context) for span in spans]
    return JSONResponse(found[0] if given.top_k == 1 and found else found)


def _base64(vector: Tensor) -> str:
    """Little-endian float32, as OpenAI's clients ask for and decode."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


def _tokens(tokenizer: Tokenizer, targets: list[str]) -> tuple[int, ...]:
    """A token for each word: its own, or its first."""
    found = []
    for target in targets:
        token = tokenizer.token_id(target)
        pieces = tokenizer.encode(target, add_special_tokens=False) if token is None else [token]
        if not pieces:
            raise RequestError(f"parameters.targets: {target!r} has no token", param="targets")
        found.append(pieces[0])
    return tuple(dict.fromkeys(found))


def _filled(
    tokenizer: Tokenizer, text: Text, places: tuple[int, ...], rows: list[list[Filled]]
) -> Any:
    """One list for one masked place, and a list of lists for several."""
    shapes = []
    for place, row in zip(places, rows, strict=True):
        shape = []
        for one in row:
            ids = list(text.ids)
            ids[place] = one.token
            shape.append(
                {
                    "score": one.score,
                    "token": one.token,
                    "token_str": tokenizer.decode([one.token], skip_special_tokens=False),
                    "sequence": tokenizer.decode(ids, skip_special_tokens=len(places) == 1),
                }
            )
        shapes.append(shape)
    return shapes[0] if len(shapes) == 1 else shapes


def _pair(engine: EncoderEngine, question: str, context: str) -> tuple[Pair, Text]:
    pair = engine.tokenizer.encode_pair(question, context)
    # What the tokenizer says of types is the model's own default, or it has only one type.
    return pair, checked_text(engine, pair.ids, param="inputs")


def _spanned(span: Span, pair: Pair, context: str) -> dict[str, Any]:
    begin = end = 0
    if span.tokens is not None:
        first, last = (pair.spans[token] for token in span.tokens)
        assert first is not None
        assert last is not None
        begin, end = first[0], last[1]
    return {"score": span.score, "start": begin, "end": end, "answer": context[begin:end]}
