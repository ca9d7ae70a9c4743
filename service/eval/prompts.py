"""A document's questions as the model was trained to read them, the document encoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.tokenizer import Tokenizer
    from service.eval.paper import Tokens
    from service.eval.tasks import Document

OVERLAP = 1000
"""Characters at the end of a document that are encoded again with every question."""
AGREED = 16
"""Tokens at the seam that must be the same, or the whole prompt is encoded."""


def prompt_text(tokenizer: Tokenizer, document: Document, question: int) -> tuple[str, bool]:
    """A document and one of its questions, and whether special tokens are still to be added.

    A chat, where the checkpoint has a template; else `Question: ...` and `Answer:`.
    """
    asked = document.questions[question].text
    try:
        text = tokenizer.render_chat(
            [{"role": "user", "content": f"{document.text}\n\n{asked}"}],
            add_generation_prompt=True,
        )
    except TemplateError:
        return f"{document.text}\n\nQuestion: {asked}\nAnswer:", True
    return text, False


def prompt_tokens(tokenizer: Tokenizer, document: Document) -> list[Tokens]:
    """The prompt of every question, [tokens] each.

    Encoding a long document takes most of the time that drawing one does, so only the first prompt
    is encoded whole. Of the others it is the last part, with the document's end: how a text is cut
    into tokens does not depend on what stands far before. That is not taken on trust: the last part
    of the first prompt must agree with the whole of it.
    """
    pairs = [prompt_text(tokenizer, document, i) for i in range(len(document.questions))]
    texts, special = [text for text, _ in pairs], pairs[0][1]
    cut = max(0, len(document.text) - OVERLAP)
    whole, end = (_encode(tokenizer, text, special) for text in (texts[0], texts[0][cut:]))
    alike = common(whole[::-1], end[::-1])  # last tokens that the two have in common
    seam = len(end) - alike
    prompts = [whole]
    for text in texts[1:]:
        other = _encode(tokenizer, text[cut:], special)
        if text[:cut] == texts[0][:cut] and common(end, other) >= seam + AGREED:
            prompts.append(np.concatenate((whole[: len(whole) - alike], other[seam:])))
        else:
            prompts.append(_encode(tokenizer, text, special))
    return prompts


def common(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length


def split(prompts: Sequence[Tokens]) -> tuple[Tokens, tuple[Tokens, ...]]:
    """What all prompts begin with, and the rest of each."""
    length = min(common(prompts[0], other) for other in prompts)
    return prompts[0][:length], tuple(prompt[length:] for prompt in prompts)


def _encode(tokenizer: Tokenizer, text: str, special: bool) -> Tokens:
    return np.array(tokenizer.encode(text, add_special_tokens=special), dtype=np.int32)
