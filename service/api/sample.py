"""GET /v1/sample: a generated document with planted facts, to try a retrieving model on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi.responses import JSONResponse

from models.training.filler import prose
from models.training.tasks import RULER, held_out_key, magic_number
from service.api.state import state_of
from service.errors import RequestError

if TYPE_CHECKING:
    from fastapi import Request

    from models.tokenizer import Tokenizer

MOST = 32_768
"""Tokens of a document."""
ROOM = 256
"""Tokens that question and answer take."""
LETTERS = 6
"""Of a token, at most about: so much text is made and then cut."""


async def sample(request: Request) -> JSONResponse:
    """A document of `tokens` tokens with `facts` planted facts, the same for each `seed`."""
    state = state_of(request)
    most = min(MOST, state.engine.max_model_len - ROOM)
    tokens = _number(request, "tokens", min(8192, most), 64, most)
    facts = _number(request, "facts", 3, 1, 16)
    seed = _number(request, "seed", 0, 0, 2**31 - 1)
    tokenizer = state.engine.tokenizer
    return JSONResponse(await state.desk.run(lambda: _document(tokenizer, tokens, facts, seed)))


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise RequestError(f"{name}: must be a number from {least} to {most}", param=name)
    return int(text)


def _document(tokenizer: Tokenizer, tokens: int, facts: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    keys: dict[str, str] = {}
    while len(keys) < facts:
        keys.setdefault(held_out_key(rng), magic_number(rng))
    planted = [RULER.needle.format(key=key, value=value) for key, value in keys.items()]
    room = tokens - sum(len(tokenizer.encode(f" {fact}", False)) for fact in planted)
    filler = prose(int(rng.integers(2**31)), max(room, 1) * LETTERS, held_out=True)
    sentences = re.split(r'(?<=[.!?"”])(?=\s)', filler)
    sizes = np.cumsum([len(tokenizer.encode(sentence, False)) for sentence in sentences])
    sentences = sentences[: max(1, int(np.searchsorted(sizes, room, side="right")))]
    # One in each equal part of the text, so that none lies beside another.
    depths = (np.arange(facts) + rng.random(facts)) / facts
    places = sorted((1 + depths * len(sentences)).astype(int).tolist(), reverse=True)
    for place, fact in zip(places, reversed(planted), strict=True):
        sentences.insert(place, f" {fact}")
    text = "".join(sentences).strip()
    return {
        "object": "sample",
        "text": text,
        "facts": [
            {
                "key": key,
                "value": value,
                "start": text.index(fact),
                "end": text.index(fact) + len(fact),
            }
            for (key, value), fact in zip(keys.items(), planted, strict=True)
        ],
        "questions": [RULER.question_one.format(key=key) for key in keys],
    }
