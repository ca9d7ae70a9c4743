"""From folders of text to a tokenizer, token arrays for the workers, and an evaluation builder."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from models.training import words
from models.training.bpe import train_tokenizer
from models.training.corpus import Corpus, read_texts, token_bytes, tokenise
from models.training.examples import ExampleBuilder
from models.training.filler import prose
from models.training.mix import Mix
from models.training.start import copy_tokenizer
from models.training.state import has_state
from models.training.tasks import form_words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from models.training.plans import Plan


@dataclass(frozen=True)
class Data:
    """What training and evaluation read; processes can pass it on."""

    folder: Path  # tokenizer.json, words.json, text/ and generated/ for the workers
    tokenizer: Path
    files: int
    size: int  # bytes of text
    tokens: int  # of text
    validation: Corpus
    unseen: Corpus  # held-out generated prose
    sizes: npt.NDArray[np.int64]  # [vocab] bytes of a token

    @cached_property
    def builder(self) -> ExampleBuilder:
        """Draws held-out examples over the validation text."""
        tokenizer = Tokenizer.from_file(str(self.tokenizer))
        mix = Mix(interleaved=0.0)
        return ExampleBuilder(tokenizer, self.validation, self.unseen, held_out=True, mix=mix)


def prepare(
    text: Path,
    validation: Path | None,
    plan: Plan,
    scratch: Path,
    state: Path,
    start: Path | None = None,
) -> Data:
    """Trains or reloads the tokenizer (`state`/tokenizer.json) and tokenises everything.

    Without a validation folder, held-out generated prose takes its place. With the checkpoint
    folder `start` that a new run begins from, its tokenizer is taken.

    Raises:
        TrainingError: a folder without usable text, or a start with another kind of tokenizer.
    """
    began = time.perf_counter()
    texts = read_texts(text)
    generated = prose(1, plan.filler_characters)
    saved = state / "tokenizer.json"
    if start is not None and not has_state(state):
        copy_tokenizer(start, saved, plan.shape.vocab)
    if not saved.exists():
        sample = _sample([*texts, generated[: plan.tokenizer_characters // 20]], plan)
        # The task forms' words are rare in books; as tokens of their own they are copied in one.
        sample += [form_words()] * (plan.tokenizer_characters // 10_000)
        state.mkdir(parents=True, exist_ok=True)
        train_tokenizer(sample, plan.shape.vocab).save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))
    trained = time.perf_counter()
    corpus = tokenise(texts, tokenizer)
    corpus.save(scratch / "text")
    tokenise([generated], tokenizer).save(scratch / "generated")
    (scratch / "tokenizer.json").write_bytes(saved.read_bytes())
    (scratch / "words.json").write_text(json.dumps(_frequent_words(texts)), encoding="utf-8")
    unseen = tokenise([prose(2, plan.filler_characters // 4, held_out=True)], tokenizer)
    held_out = tokenise(read_texts(validation), tokenizer) if validation else unseen
    size = sum(len(t.encode()) for t in texts)
    print(
        f"text: {len(texts)} files, {size / 1e6:.1f} MB, {len(corpus.tokens) / 1e6:.2f} M tokens; "
        f"tokenizer {trained - began:.1f} s, tokens {time.perf_counter() - trained:.1f} s"
    )
    return Data(
        folder=scratch,
        tokenizer=saved,
        files=len(texts),
        size=size,
        tokens=len(corpus.tokens),
        validation=held_out,
        unseen=unseen,
        sizes=token_bytes(tokenizer),
    )


def _sample(texts: Sequence[str], plan: Plan) -> list[str]:
    """An even sample of paragraph-sized pieces with at most the plan's characters."""
    pieces = [text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000)]
    step = max(1.0, 20_000 * len(pieces) / plan.tokenizer_characters)
    return [pieces[int(i * step)] for i in range(int(len(pieces) / step))]


def _frequent_words(texts: Sequence[str]) -> list[str]:
    """The 6000 most frequent lower-case words of four to ten letters, held-out words excepted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"\b[a-z]{4,10}\b", text[:200_000]))
    banned = {*words.HELD_OUT_ADJECTIVES, *words.HELD_OUT_NOUNS}
    return [word for word, _ in counts.most_common(6000) if word not in banned]
