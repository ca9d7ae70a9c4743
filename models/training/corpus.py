"""Tokenised text as flat arrays, with the places where it may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.training.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

_CHUNK = 200_000  # characters a call to the tokenizer: large enough to batch, small enough to share
_FILES = ("tokens", "paragraphs", "sentences")


@dataclass(frozen=True, slots=True)
class Corpus:
    """One text, tokenised."""

    tokens: npt.NDArray[np.uint16]  # [tokens]
    paragraphs: npt.NDArray[np.int64]  # [paragraphs] where a paragraph starts, without a space
    sentences: npt.NDArray[np.int64]  # [sentences] where a sentence may be inserted: a stop before,
    #                                   a space or an empty line after

    def save(self, folder: Path) -> None:
        """Writes three .npy files, which workers map into memory."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Maps the files of `save` read-only."""
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES]
        return cls(*arrays)


def read_texts(folder: Path) -> list[str]:
    """The .txt files of a folder and its sub-folders, in the order of their names.

    Raises:
        TrainingError: there is none, or one is not UTF-8.
    """
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise TrainingError(f"{folder} holds no .txt file: name a folder of plain-text files.")
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8").replace("\r\n", "\n").strip())
        except UnicodeDecodeError as error:
            raise TrainingError(f"{path} is not UTF-8 text: convert or remove it.") from error
    return texts


def _split(text: str) -> list[str]:
    """Cuts a text before newlines, in pieces of about `_CHUNK` characters."""
    pieces = []
    start = 0
    while start < len(text):
        stop = start + _CHUNK
        cut = text.find("\n", stop) if stop < len(text) else -1
        cut = len(text) if cut < 0 else cut
        pieces.append(text[start:cut])
        start = cut
    return pieces


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenises texts and joins them with empty lines."""
    pieces = [piece for text in texts for piece in [*_split(text), "\n\n"]]
    encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
    tokens = np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in encodings])  # [tokens]
    strings = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    newline = np.array([bool(s) and not s.strip("\n") for s in strings])  # [vocab]
    spaced = np.array([len(s) > 1 and s[0] == " " and s[1].isalpha() for s in strings])  # [vocab]
    stop = np.array([s.rstrip("\"'”’ ").endswith((".", "!", "?")) for s in strings])
    initial = np.array([bool(s) and (s[0].isalpha() or s[0] in "\"'") for s in strings])  # [vocab]
    before, after = tokens[:-1], tokens[1:]  # [tokens - 1]
    paragraphs = np.flatnonzero(newline[before] & initial[after]) + 1  # [paragraphs]
    sentences = np.flatnonzero(stop[before] & (spaced | newline)[after]) + 1  # [sentences]
    return Corpus(tokens, np.concatenate([[0], paragraphs]), sentences)


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes of text behind each token id: int64 [vocab]; special tokens have none."""
    special = set(tokenizer.get_added_tokens_decoder())
    sizes = [
        0 if i in special else len(tokenizer.id_to_token(i) or "")
        for i in range(tokenizer.get_vocab_size())
    ]
    return np.asarray(sizes, dtype=np.int64)
